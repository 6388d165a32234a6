"""The page's style and script."""

from fcmae.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f27;--soft:#5b6472;--line:#e2e6eb;--paper:#fff;--box:#f6f7f9;--warn:#b45309;
--good:#15803d;--bad:#b91c1c;
--c0:#0b62c4;--c1:#c2410c;--c2:#0f766e;--c3:#9333ea;--c4:#a16207;--c5:#be185d;--c6:#4d7c0f;--c7:#475569}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9ba4b0;--line:#2f363f;--paper:#13161b;--box:#1b1f26;
--warn:#fbbf24;--good:#4ade80;--bad:#f87171;
--c0:#6aa9ff;--c1:#fb923c;--c2:#2dd4bf;--c3:#c084fc;--c4:#facc15;--c5:#f472b6;--c6:#a3e635;--c7:#94a3b8}}
*{box-sizing:border-box}
html{scroll-padding-top:56px}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1400px;margin:0 auto;padding:0 20px 32px}
header{padding:26px 0 6px}
h1{font-size:1.55rem;line-height:1.25;font-weight:650;margin:0;overflow-wrap:anywhere}
header p{margin:4px 0 0}
nav{position:sticky;top:0;z-index:1;display:flex;gap:2px 20px;overflow-x:auto;padding:10px 0;margin-bottom:6px;
background:var(--paper);border-bottom:1px solid var(--line);font-size:.9rem;white-space:nowrap}
nav a{color:var(--soft);text-decoration:none}
nav a:hover{color:var(--ink)}
h2{font-size:1.2rem;font-weight:600;margin:34px 0 12px}
h3{font-size:.95rem;font-weight:600;margin:22px 0 10px;overflow-wrap:anywhere}
.soft,p,footer{color:var(--soft)}
p,footer{font-size:.87rem;margin:8px 0}
footer{margin-top:40px;border-top:1px solid var(--line);padding-top:12px}
.lead{color:var(--ink);font-size:1rem;max-width:75ch}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:5px 22px 5px 0;border-bottom:1px solid var(--line);white-space:nowrap}
td.n,th.n{text-align:right}
@media(max-width:500px){td:first-child{white-space:normal}td,th{padding-right:14px}}
.long{white-space:normal;min-width:16em;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500}
code{font:.92em ui-monospace,"SF Mono",Menlo,monospace}
td code{white-space:normal;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--soft);font-size:.9rem;margin:8px 0}
.swatch{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
.legend{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:.88rem;margin:0 0 10px;overflow-wrap:anywhere}
.legend svg{display:inline-block;width:26px;height:8px;margin-right:7px;vertical-align:middle}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px}
.tile{background:var(--box);border-radius:8px;padding:10px 13px}
.tile dt{color:var(--soft);font-size:.8rem}
.tile dd{margin:1px 0 0;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.running,.done{color:var(--good)}
.killed{color:var(--bad)}
.stopped{color:var(--warn)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:14px}
figure{margin:0}
.chart{background:var(--box);border-radius:8px;padding:11px 12px 4px;min-width:0}
figcaption{font-size:.88rem;font-weight:500;padding:0 0 5px 3px;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px;font-variant-numeric:tabular-nums}
svg .grid{stroke:var(--line)}
svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg polyline.raw{opacity:.28;stroke-width:1}
svg polygon{opacity:.13}
svg .mark{stroke-dasharray:2 4;opacity:.75}
svg .warning{fill:var(--warn)}
svg .at{stroke:var(--soft);stroke-dasharray:3 3}
.chart output{display:block;min-height:1.5em;font-size:.8rem;color:var(--soft);padding-left:3px;
font-variant-numeric:tabular-nums}
.strip{position:relative;height:26px;margin:6px 8px 2px}
.strip::before{content:"";position:absolute;left:0;right:0;top:12px;height:2px;background:var(--line)}
.strip i{position:absolute;top:6px;width:14px;height:14px;margin-left:-7px;border-radius:50%;
border:3px solid var(--paper)}
.strip i.warning{border-radius:0;background:var(--warn);clip-path:polygon(50% 8%,100% 95%,0 95%)}
.strip em{position:absolute;top:12px;height:2px}
.pictures{margin-bottom:20px}
.pictures>img,.plot img,.plain img{max-width:100%;border-radius:6px;display:block}
.pictures img[hidden]{display:none}
.pictures input{width:min(100%,420px);display:block;margin:2px 0 10px;accent-color:var(--c0)}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:14px;margin:14px 0}
.plot{background:var(--box);border-radius:8px;padding:11px 12px}
.study{max-width:680px;margin:18px 0 0}
.plain{margin:14px 0}
.thumbs{display:flex;flex-wrap:wrap;gap:12px;margin:12px 0}
.thumbs figure{width:112px}
.thumbs img{width:112px;height:112px;object-fit:contain;background:var(--box);border-radius:6px;display:block}
.thumbs figcaption{font-size:.72rem;line-height:1.3;font-weight:400;color:var(--soft);padding:4px 0 0;
overflow-wrap:anywhere}
@media(max-width:500px){main{padding:0 14px 24px}.tiles{grid-template-columns:1fr 1fr}
.thumbs figure,.thumbs img{width:78px}.thumbs img{height:78px}h1{font-size:1.3rem}}
"""

SCRIPT = f"const WIDTH={WIDTH},HEIGHT={HEIGHT},LEFT={LEFT},RIGHT={RIGHT},TOP={TOP},BOTTOM={BOTTOM};"
SCRIPT += """
for(const figure of document.querySelectorAll('.pictures')){
  const slider=figure.querySelector('input'),step=figure.querySelector('output');
  const images=[...figure.querySelectorAll('img')];
  if(slider)slider.addEventListener('input',()=>{
    images.forEach((image,i)=>image.hidden=i!=slider.value);
    step.textContent=images[slider.value].dataset.step;
  });
}
const charts=[...document.querySelectorAll('.chart svg[data-lines]')].map(svg=>{
  const at=document.createElementNS('http://www.w3.org/2000/svg','line');
  at.setAttribute('class','at');at.setAttribute('y1',TOP);at.setAttribute('y2',HEIGHT-BOTTOM);
  return {svg,at,data:JSON.parse(svg.dataset.lines),out:svg.parentNode.querySelector('output')};
});
const nearest=(points,step)=>{
  let low=0,high=points.length-1;
  while(low<high){const middle=low+high>>1;points[middle][0]<step?low=middle+1:high=middle}
  return low&&step-points[low-1][0]<points[low][0]-step?points[low-1]:points[low];
};
for(const {svg,data} of charts){
  svg.addEventListener('pointermove',event=>{
    const box=svg.getBoundingClientRect(),x=(event.clientX-box.left)/box.width*WIDTH;
    const step=data.x[0]+(x-LEFT)/(WIDTH-LEFT-RIGHT)*(data.x[1]-data.x[0]);
    for(const {svg,at,data,out} of charts){
      const share=(step-data.x[0])/(data.x[1]-data.x[0]||1);
      if(share<0||share>1){at.remove();out.textContent='';continue}
      const across=LEFT+share*(WIDTH-LEFT-RIGHT);
      at.setAttribute('x1',across);at.setAttribute('x2',across);svg.append(at);
      out.textContent='step '+nearest(data.lines[0][1],step)[0]+': '+data.lines.map(([name,points])=>
        (data.lines.length>1?name+' ':'')+nearest(points,step)[1]).join(', ');
    }
  });
  svg.addEventListener('pointerleave',()=>{for(const {at,out} of charts){at.remove();out.textContent=''}});
}
"""
