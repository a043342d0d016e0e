"""The report of an export as one HTML page that needs nothing else: no script, no request."""

from __future__ import annotations

import base64
import html
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_whole
from .report import ExportReport

if TYPE_CHECKING:
    from keras_effnet.quantization.analysis import AnalysisRow

# Of the layers, the worst stand in a table; the picture shows all.
_LAYERS_LISTED = 12
# A tensor whose error is a hundredth of it (40 dB) or less costs nothing that can be measured;
# below 15 dB the error is a fifth of it.
_GOOD_SQNR, _BAD_SQNR = 40.0, 15.0
_BEST_SHOWN = 60.0
_ROW_HEIGHT = 15
_GOOD, _FAIR, _BAD, _QUIET = "#117733", "#996600", "#aa2233", "#5b6470"

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #f5f6f8; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: .3rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
section { background: #fff; border: 1px solid #dde1e6; border-radius: .6rem; padding: 1rem;
  margin: 0 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #e7eaee;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: #5b6470; font-size: .85rem; }
td.text { text-align: left; white-space: normal; min-width: 12rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f0f2f5; padding: .7rem;
  border-radius: .4rem; margin: 0; font-size: .85rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; }
.fact { background: #f5f6f8; border-radius: .4rem; padding: .5rem .7rem; }
.fact b { display: block; font-size: 1.15rem; overflow-wrap: anywhere; }
.fact span, .quiet { color: #5b6470; font-size: .85rem; overflow-wrap: anywhere; }
.verdict { font-weight: 600; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr));
  gap: .8rem; }
figure { margin: 0; font-size: .85rem; }
figure img { width: 100%; height: auto; border-radius: .4rem; display: block; }
figcaption { overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
summary { cursor: pointer; padding: .3rem 0; }
ul { padding-left: 1.2rem; margin: .3rem 0; overflow-wrap: anywhere; }
@media (max-width: 36rem) {
  main { padding: .5rem; }
  section { padding: .7rem; }
  th, td { padding: .25rem .3rem; font-size: .8rem; }
  th, td:first-child { white-space: normal; }
  td:first-child { min-width: 6.5rem; overflow-wrap: anywhere; }
}
"""


def html_report(
    report: ExportReport,
    *,
    names: Sequence[str] | None = None,
    pictures: Mapping[int, bytes] | None = None,
) -> str:
    """Makes the page.

    Args:
        report: The outcome of an export.
        names: Of the classes, or None.
        pictures: Of `report.worst`, by their index: JPEG files.

    Returns:
        The page. All texts in it are escaped, file names of photographs too.
    """
    data = report.as_json()
    title = f"{data['model']['name']}: {Path(data['file']['path']).name}"
    parts = [
        _head(data, title),
        _facts(data),
        _accuracy(data),
        _warnings(data),
        _targets(data),
        _worst(report, names, pictures or {}),
        _layers(report),
        _operators(report, data),
        _details(data),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Browsers ask for an icon unless the page has one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def write_html(
    path: str | os.PathLike,
    report: ExportReport,
    *,
    names: Sequence[str] | None = None,
    pictures: Mapping[int, bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the page, whole or not at all.

    Args:
        path: File to write, usually `*.html`.
        report: See `html_report`.
        names: See `html_report`.
        pictures: See `html_report`.
        overwrite: Whether an existing file may be replaced.

    Returns:
        The path.

    Raises:
        OSError: As `to_tflite`.
    """
    page = html_report(report, names=names, pictures=pictures)
    return write_whole(path, page.encode(), overwrite=overwrite)


# Parts


def _head(data: dict[str, Any], title: str) -> str:
    if data["failures"]:
        verdict = f"Failed: {'; '.join(data['failures'])}."
        colour = _BAD
    elif data["warnings"]:
        verdict, colour = "Written, with warnings.", _FAIR
    else:
        verdict, colour = "Written and verified.", _GOOD
    return (
        f'<h1>{_text(title)}</h1>\n<p class="verdict" style="color:{colour}">{_text(verdict)}</p>'
    )


def _facts(data: dict[str, Any]) -> str:
    model, file = data["model"], data["file"]
    size = file["bytes"]
    facts = [("file", _megabytes(size), f"{size:,} bytes")]
    for key, name in (("float_bytes", "of float"), ("int8_bytes", "of its int8 parameters")):
        if data["sizes"].get(key):
            whole = data["sizes"][key]
            facts.append(("size", f"{size / whole:.2f} x", f"{name}, {whole:,} bytes"))
    facts.append(("quantization", file["quantization"], f"input and output {file['io_dtype']}"))
    height, width, channels = model["input_shape"]
    facts.append(("input", f"{height} x {width} x {channels}", f"{model['classes']} classes"))
    if "parameters" in model:
        facts.append(("parameters", f"{model['parameters'] / 1e6:.2f} M", str(model["weights"])))
    cells = "".join(
        f'<div class="fact"><span>{_text(name)}</span><b>{_text(value)}</b>'
        f"<span>{_text(note)}</span></div>"
        for name, value, note in facts
    )
    return f'<section>\n<h2>Model</h2>\n<div class="facts">{cells}</div>\n</section>'


def _accuracy(data: dict[str, Any]) -> str:
    rows = []
    for each in data["accuracy"]:
        sqnr = "-" if each["sqnr_db"] is None else f"{each['sqnr_db']:.1f} dB"
        rows.append(
            (
                each["name"],
                _share(each["top1"]),
                _share(each["top5"]),
                _share(each["agreement"]),
                sqnr,
                f"{each['mean_abs_difference']:.2g}",
                f"{each['max_abs_difference']:.2g}",
            )
        )
    head = ("", "top-1", "top-5", "agreement", "SQNR", "mean |diff|", "max |diff|")
    used = data["verification"]
    note = f"On {used['images']} images: {used['source']}"
    demands = {name: value for name, value in data["thresholds"].items() if value is not None}
    if demands:
        note += ". Demanded: " + ", ".join(f"{name} {value:g}" for name, value in demands.items())
    return (
        f"<section>\n<h2>Accuracy</h2>\n{_table(head, rows)}\n"
        f'<p class="quiet">{_text(note)}</p>\n</section>'
    )


def _warnings(data: dict[str, Any]) -> str:
    if not data["warnings"]:
        return ""
    items = "".join(f"<li>{_text(text)}</li>" for text in data["warnings"])
    return f'<section>\n<h2 style="color:{_FAIR}">Warnings</h2>\n<ul>{items}</ul>\n</section>'


def _targets(data: dict[str, Any]) -> str:
    if not data["targets"]:
        return ""
    rows, notes = [], []
    for each in data["targets"]:
        cache = each["fits_cache"]
        rows.append(
            (
                each["title"],
                "yes" if each["fits"] else "no",
                str(each["mapped"]),
                str(each["at_risk"]),
                str(each["not_mapped"]),
                "-" if cache is None else "yes" if cache else "no",
            )
        )
        for text in (*each["problems"], *each["advice"]):
            notes.append(f"<li><b>{_text(each['target'])}</b>: {_text(text)}</li>")
    head = ("target", "takes it", "mapped", "at risk", "not mapped", "fits on chip")
    listed = f"<ul>{''.join(notes)}</ul>" if notes else ""
    return f"<section>\n<h2>Devices</h2>\n{_table(head, rows)}\n{listed}\n</section>"


def _worst(report: ExportReport, names: Sequence[str] | None, pictures: Mapping[int, bytes]) -> str:
    shown = [image for image in report.worst if image.index in pictures]
    if not shown:
        return ""

    def name(index: int) -> str:
        return str(index) if names is None else names[index]

    figures = []
    for image in shown:
        encoded = base64.b64encode(pictures[image.index]).decode()
        colour = _GOOD if image.found == image.expected else _BAD
        lines = [
            f"float: {_text(name(image.expected))} {image.expected_score:.2f}",
            f'<span style="color:{colour}">file: {_text(name(image.found))} '
            f"{image.found_score:.2f}</span>",
        ]
        if image.label is not None:
            lines.append(f"label: {_text(name(image.label))}")
        figures.append(
            f'<figure><img alt="image {image.index}" src="data:image/jpeg;base64,{encoded}">'
            f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
        )
    return (
        "<section>\n<h2>Images with the largest differences</h2>\n"
        f'<div class="photos">{"".join(figures)}</div>\n</section>'
    )


def _layers(report: ExportReport) -> str:
    analysis = report.analysis
    if analysis is None:
        return ""
    finite = [row for row in analysis.rows if math.isfinite(row.sqnr)]
    worst = sorted(finite, key=lambda row: row.sqnr)[:_LAYERS_LISTED]
    rows = [
        (
            row.layer,
            row.kind,
            f"{row.sqnr:.1f} dB",
            f"{row.low:.4g} … {row.high:.4g}",
            f"{row.minimum:.4g} … {row.maximum:.4g}",
            f"{row.clipped:.2%}",
        )
        for row in worst
    ]
    head = ("layer", "what", "SQNR", "values in float", "range of 8 bits", "clipped")
    losses = ""
    if analysis.losses:
        ranked = sorted(analysis.losses, key=lambda loss: loss.badness, reverse=True)
        cells = [
            (
                loss.layer,
                "-" if loss.agreement_loss is None else f"{loss.agreement_loss:.1%}",
                "-" if loss.divergence is None else f"{loss.divergence:.3g}",
                f"{loss.noise:.3g}",
            )
            for loss in ranked
        ]
        header = ("quantized alone", "other choice", "divergence", "output noise")
        losses = f"<h2>What single layers cost</h2>\n{_table(header, cells)}\n"
    return (
        f"<section>\n<h2>Layers with the least signal to noise</h2>\n{_table(head, rows)}\n"
        f'<p class="quiet">On {analysis.images} images. A tensor counts what the layers before it '
        f"did to it.</p>\n{losses}"
        f"<details><summary>All {len(analysis.rows)} tensors and kernels: SQNR and ranges</summary>"
        f"\n{_layer_plot(analysis.rows)}\n</details>\n</section>"
    )


def _layer_plot(rows: Sequence[AnalysisRow]) -> str:
    """One line for each tensor: its SQNR as a bar, and where its values lie in its range."""
    left, bar, gap, spread = 170, 110, 16, 104
    width = left + bar + gap + spread
    height = _ROW_HEIGHT * (len(rows) + 2)
    ranges = left + bar + gap
    marks = [
        f'<text x="{left}" y="11">SQNR, 0 to {_BEST_SHOWN:g} dB</text>'
        f'<text x="{ranges}" y="11">values in the range</text>'
    ]
    for number, row in enumerate(rows, start=1):
        top = _ROW_HEIGHT * number
        exact = not math.isfinite(row.sqnr)
        length = bar * min(max(row.sqnr, 0), _BEST_SHOWN) / _BEST_SHOWN
        colour = _GOOD if row.sqnr >= _GOOD_SQNR else _FAIR if row.sqnr >= _BAD_SQNR else _BAD
        shown = row.layer if len(row.layer) <= 28 else f"…{row.layer[-27:]}"
        note = "exact" if exact else f"{row.sqnr:.1f} dB"
        span = row.maximum - row.minimum or 1.0
        low, high = (
            ranges + spread * min(max((value - row.minimum) / span, -0.04), 1.04)
            for value in (row.low, row.high)
        )
        clipped = row.low < row.minimum or row.high > row.maximum
        marks.append(
            f"<g><title>{_text(row.layer)} ({row.kind}): {note}; values {row.low:.4g} to "
            f"{row.high:.4g}, range {row.minimum:.4g} to {row.maximum:.4g}</title>"
            f'<text x="0" y="{top + 11}">{_text(shown)}{" (k)" if row.kind == "kernel" else ""}'
            f'</text><rect x="{left}" y="{top + 3}" width="{length:.1f}" height="9" '
            f'fill="{colour}"/><rect x="{ranges}" y="{top + 6}" width="{spread}" height="3" '
            f'fill="#d3d9e0"/><rect x="{low:.1f}" y="{top + 4}" '
            f'width="{max(high - low, 0.8):.1f}" height="7" '
            f'fill="{_FAIR if clipped else "#0072b2"}"/></g>'
        )
    return (
        f'<svg viewBox="-2 0 {width + 8} {height}" role="img" font-size="10" '
        f'fill="#1b1f24"><title>SQNR and ranges by layer</title>{"".join(marks)}</svg>'
    )


def _operators(report: ExportReport, data: dict[str, Any]) -> str:
    verdicts = report.targets
    if not verdicts:
        rows = [(op, str(count)) for op, count in data["file"]["ops"].items()]
        table = _table(("operator", "count"), rows)
        return f"<section>\n<h2>Operators</h2>\n{table}\n</section>"
    kinds: dict[tuple[str, int], dict[str, set[str]]] = {}
    counts: dict[tuple[str, int], int] = {}
    for verdict in verdicts:
        for (op, version, status), count in verdict.histogram().items():
            kinds.setdefault((op, version), {}).setdefault(verdict.target, set()).add(status)
            if verdict is verdicts[0]:
                counts[op, version] = counts.get((op, version), 0) + count
    most = max(counts.values(), default=1)
    rows = []
    for (op, version), count in sorted(counts.items(), key=lambda item: -item[1]):
        bar = (
            f'<svg viewBox="0 0 100 8" style="width:6rem" aria-hidden="true">'
            f'<rect width="{100 * count / most:.1f}" height="8" fill="#0072b2"/></svg>'
        )
        statuses = [
            ", ".join(sorted(kinds[op, version].get(verdict.target, {"-"}))) for verdict in verdicts
        ]
        rows.append((op, str(version), str(count), _Raw(bar), *statuses))
    head = ("operator", "version", "count", "", *(verdict.target for verdict in verdicts))
    return f"<section>\n<h2>Operators</h2>\n{_table(head, rows)}\n</section>"


def _details(data: dict[str, Any]) -> str:
    ends = []
    for role in ("inputs", "outputs"):
        for tensor in data["file"][role]:
            scale = "-"
            if len(tensor["scale"]) == 1:
                scale = f"{tensor['scale'][0]:.6g}, zero point {tensor['zero_point'][0]}"
            ends.append((role[:-1], tensor["name"], tensor["dtype"], str(tensor["shape"]), scale))
    head = ("", "name", "type", "shape", "scale")
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    seconds = ", ".join(f"{stage} {taken:g} s" for stage, taken in data["seconds"].items())
    quantizer = ""
    if data["quantizer"] is not None:
        texts = ", ".join(f"{key} {value}" for key, value in data["quantizer"].items())
        quantizer = f'<p class="quiet">Quantizer: {_text(texts)}</p>'
    return (
        f"<section>\n<h2>How it was made</h2>\n<pre>{_text(shlex.join(data['command']))}</pre>\n"
        f"{_table(head, ends)}\n{quantizer}"
        f'<p class="quiet">{_text(versions)}<br>{_text(seconds)}</p>\n</section>'
    )


# Pieces


class _Raw(str):
    """Text that is HTML already."""


def _text(value: Any) -> str:
    return value if isinstance(value, _Raw) else html.escape(str(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
