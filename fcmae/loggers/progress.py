"""What a run shows while it is running: a bar on a terminal, lines elsewhere, curves and pictures in a notebook."""

import base64
import html
import io
import os
import statistics
import sys
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from fcmae.messages import say
from fcmae.report.charts import Line, chart
from fcmae.report.parts import title_of
from fcmae.status import SIGNS


class Progress(Protocol):
    """A sink that also sees every step."""

    def advance(self) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, image: Image.Image) -> None: ...

    def close(self) -> None: ...


def create_progress(label: str, start_step: int, stop_step: int, enabled: bool, folder: Path | None = None) -> Progress:
    """The progress of steps ``start_step`` to ``stop_step``, where this process shows it.

    Args:
        folder: the run's, which is named once.
    """
    display = notebook_display() if enabled else None
    if display is not None:
        return NotebookProgress(label, start_step, stop_step, display)
    if enabled and folder is not None:
        say(f"files of the run: {folder}")
    return TextProgress(label, start_step, stop_step, enabled)


class Numbers:
    """The last metrics in a few words."""

    LINES = 20
    """Lines of metrics: the mean loss of the newer half is compared with the older half's."""

    def __init__(self) -> None:
        self.training: dict[str, float] = {}
        self.losses: deque[float] = deque(maxlen=self.LINES)
        self.scores: dict[str, str] = {}

    def take(self, metrics: dict[str, float]) -> None:
        if "loss" in metrics:
            self.training = metrics
            self.losses.append(metrics["loss"])
            return
        names = [name for name in metrics if name not in SIGNS]
        if names:
            name = names[0] if f"ema_{names[0]}" not in metrics else f"ema_{names[0]}"
            self.scores.pop(name, None)
            self.scores[name] = f"{name} {metrics[name]:.4g}"

    def text(self, columns: int) -> str:
        """Loss and its trend, images per second, memory, and the last scores as far as there is space."""
        last, parts = self.training, []
        if last:
            parts += [f"loss {last['loss']:.4g}{self._trend()}", f"{last['images_per_second']:,.0f} images/s"]
            parts += [f"{last['memory_gib']:.1f} GiB"] * bool(last.get("memory_gib"))
        for score in reversed(self.scores.values()):
            if len(", ".join([*parts, score])) < columns:
                parts.append(score)
        return ", ".join(parts)[: columns - 1]

    def _trend(self) -> str:
        half = len(self.losses) // 2
        if not half:
            return ""
        losses = list(self.losses)
        return f" ({statistics.fmean(losses[-half:]) - statistics.fmean(losses[:half]):+.2g})"


class TextProgress:
    """Two lines on a terminal, a bar and numbers; a line for every log elsewhere."""

    BAR = "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}, {remaining} left"

    def __init__(self, label: str, start_step: int, stop_step: int, enabled: bool) -> None:
        self.label = label
        self.stop_step = stop_step
        self.enabled = enabled
        self.numbers = Numbers()
        terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(
            initial=start_step,
            total=stop_step,
            desc=label,
            bar_format=self.BAR,
            disable=not terminal,
            dynamic_ncols=True,
        )
        self.below = tqdm(total=0, bar_format="{desc}", disable=not terminal, dynamic_ncols=True, position=1)

    def advance(self) -> None:
        self.bar.update()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.bar.disable:
            self.numbers.take(metrics)
            if "epoch" in metrics:
                self.bar.set_postfix_str(f"epoch {metrics['epoch']:.1f}", refresh=False)
            columns = os.get_terminal_size(self.bar.fp.fileno()).columns
            self.below.set_description_str(self.numbers.text(columns))
        elif self.enabled:
            names = ("loss", "images_per_second") if "loss" in metrics else tuple(metrics)  # training or an evaluation
            left = metrics.get("seconds_left")
            end = f", {left:.0f} s left" if left is not None else ""
            values = " ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
            print(f"{self.label} step {step}/{self.stop_step} {values}{end}", file=sys.stderr, flush=True)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        pass

    def close(self) -> None:
        self.below.close()
        self.bar.close()


def notebook_display() -> Any:
    """What updates HTML in the running notebook cell; None outside of a notebook. IPython is not imported."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import HTML, display

    handle = display(HTML(""), display_id=True)
    return lambda text: handle.update(HTML(text))


STYLE = """<style>.fcmae{max-width:900px;--c0:#3b82f6;font:13px system-ui,sans-serif}
.fcmae progress{width:100%}.fcmae figure{display:inline-block;width:48%;min-width:300px;margin:6px 0}
.fcmae svg{width:100%}.fcmae svg text{fill:currentColor;font-size:12px}.fcmae svg .grid{stroke:#8884}
.fcmae svg polyline{fill:none;stroke-width:1.8}.fcmae img{max-width:100%}</style>"""


class NotebookProgress:
    """A bar, a line of numbers, curves of the losses and the last pictures, in the cell that started the run.

    Args:
        show: takes HTML, which replaces what it was given before.
    """

    SECONDS = 1.0
    """Between two updates."""

    def __init__(self, label: str, start_step: int, stop_step: int, show: Any) -> None:
        self.label, self.step, self.stop_step, self.show = label, start_step, stop_step, show
        self.series: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.numbers = ""
        self.pictures: dict[str, str] = {}
        self.shown = 0.0

    def advance(self) -> None:
        self.step += 1
        if time.monotonic() - self.shown >= self.SECONDS:
            self._update()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name == "loss" or "loss" not in metrics:  # of training, or an evaluation
                self.series[name].append((step, value))
        if "loss" in metrics:
            left = f", {metrics['seconds_left']:.0f} s left" if "seconds_left" in metrics else ""
            self.numbers = f"loss {metrics['loss']:.4g}, {metrics['images_per_second']:.0f} images/s{left}"
        self._update()

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
        source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        self.pictures[name] = f'<div>{html.escape(name)}, step {step}<br><img src="{source}"></div>'
        self._update()

    def close(self) -> None:
        self._update()

    def _update(self) -> None:
        self.shown = time.monotonic()
        names = sorted(self.series, key=lambda name: (name != "loss", name != "val_loss"))
        series = {name: self.series[name] for name in names if any(value for _, value in self.series[name])}
        charts = "".join(chart(title_of(name), [Line(name, 0, points)]) for name, points in series.items())
        bar = f'<progress max="{self.stop_step}" value="{self.step}"></progress>'
        head = html.escape(f"{self.label}: step {self.step}/{self.stop_step} {self.numbers}")
        self.show(f'{STYLE}<div class="fcmae">{head}{bar}{charts}{"".join(self.pictures.values())}</div>')
