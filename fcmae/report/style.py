"""The page's style and script."""

from fcmae.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

STYLE = """
:root{color-scheme:light dark;--ink:#1d2129;--soft:#5c6470;--line:#dfe3e8;--paper:#fff;--box:#f6f7f9;
--c0:#0b62c4;--c1:#c2410c;--c2:#0f766e;--c3:#9333ea;--c4:#a16207;--c5:#be185d;--c6:#4d7c0f;--c7:#475569}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--soft:#9aa3ae;--line:#333a44;--paper:#14171c;--box:#1c2027;
--c0:#6aa9ff;--c1:#fb923c;--c2:#2dd4bf;--c3:#c084fc;--c4:#facc15;--c5:#f472b6;--c6:#a3e635;--c7:#94a3b8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1400px;margin:0 auto;padding:24px 16px}
h1{font-size:1.4rem;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:32px 0 10px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-bottom:1px solid var(--line);white-space:nowrap}
td code{white-space:normal;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500}
.swatch{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:7px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:14px}
figure{margin:0}
.chart{background:var(--box);border-radius:8px;padding:10px 10px 4px;position:relative}
figcaption{font-size:.9rem;color:var(--soft);padding:0 0 4px 4px}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px}
svg .grid{stroke:var(--line)}
svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
svg .mark{stroke-dasharray:2 4;opacity:.7}
svg .at{stroke:var(--soft);stroke-dasharray:3 3}
.chart output{display:block;min-height:1.4em;font-size:.8rem;color:var(--soft);padding-left:4px}
.pictures{margin-bottom:18px}
.pictures img{max-width:100%;border-radius:6px;image-rendering:auto}
.pictures img[hidden]{display:none}
.pictures input{width:min(100%,420px);display:block;margin:0 0 8px}
p,footer{color:var(--soft);font-size:.85rem}
footer{margin-top:32px}
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
for(const svg of document.querySelectorAll('.chart svg')){
  const data=JSON.parse(svg.dataset.lines),out=svg.parentNode.querySelector('output');
  const at=document.createElementNS('http://www.w3.org/2000/svg','line');
  at.setAttribute('class','at');at.setAttribute('y1',TOP);at.setAttribute('y2',HEIGHT-BOTTOM);
  svg.addEventListener('pointermove',event=>{
    const box=svg.getBoundingClientRect(),x=(event.clientX-box.left)/box.width*WIDTH;
    const step=data.x[0]+(x-LEFT)/(WIDTH-LEFT-RIGHT)*(data.x[1]-data.x[0]);
    const near=points=>points.reduce((a,b)=>Math.abs(b[0]-step)<Math.abs(a[0]-step)?b:a);
    at.setAttribute('x1',x);at.setAttribute('x2',x);
    if(x>=LEFT&&x<=WIDTH-RIGHT)svg.append(at);
    out.textContent='step '+near(data.lines[0][1])[0]+': '+data.lines.map(([name,points])=>
      (data.lines.length>1?name+' ':'')+near(points)[1]).join(', ');
  });
  svg.addEventListener('pointerleave',()=>{at.remove();out.textContent=''});
}
"""
