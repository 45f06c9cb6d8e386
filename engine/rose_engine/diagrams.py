"""A certificate as pictures and as one self-contained page; needs matplotlib (`pip install 'rose-edit[bench]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rose_engine.certificate import NEAR, Certificate, tables
from rose_engine.files import write_files
from rose_engine.geometry import similarity
from rose_engine.web import picture, table

try:
    from matplotlib.figure import Figure
except ModuleNotFoundError as e:
    raise ValueError("plots need matplotlib: pip install 'rose-edit[bench]'") from e

# Subjects whose names and cells can be told apart in a matrix.
MOST = 40
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem}"
    "table{border-collapse:collapse}th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}"
    "th:first-child,td:first-child{text-align:left}img{max-width:100%}"
)


def deviation_figure(radius: Sequence[float], deviation: Mapping[str, Sequence[float]], title: str) -> Figure:
    """D by form against R, a point a subject (the paper's Figs. 2 and 7): above the line D exceeds R."""
    figure, axes = _figure(title, 6)
    for form, found in deviation.items():
        axes.scatter(radius, found, label=f"D {form}", alpha=0.7)
    most = max([*radius, *(d for found in deviation.values() for d in found), 1e-6]) * 1.05
    axes.plot([0, most], [0, most], color="black", linewidth=1, label="D = R")
    axes.set(xlabel="tolerance radius R", ylabel="activation deviation D", xlim=(0, most), ylim=(0, most))
    axes.legend()
    return figure


def matrix_figure(matrix: Sequence[Sequence[float]], names: Sequence[str], title: str, low: float = 0.0, high: float = 1.0) -> Figure:
    """A matrix of scores: gradient conflict (the paper's Figs. 3 and 9) or key similarity (Figs. 4, 11, 14, 15)."""
    figure, axes = _figure(title, 3 + 0.35 * len(names))
    image = axes.imshow(matrix, vmin=low, vmax=high, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image)
    return figure


def curve_figure(x: Sequence[float], curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, title: str) -> Figure:
    """Lines over common places."""
    figure, axes = _figure(title, 5)
    for name, found in curves.items():
        axes.plot(x, found, marker="o", label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    return figure


def _figure(title: str, size: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(size * 1.2, size), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure's file."""
    figure.savefig(drawing := BytesIO(), format="png", dpi=110)
    return drawing.getvalue()


def figures_of(certificate: Certificate, keys: Mapping[str, Tensor]) -> dict[str, Figure]:
    """name -> figure of a certificate; keys: of each edited subject a unit vector [d_in]."""
    every = certificate.subjects
    deviation = {form: [s.deviation[form] for s in every] for form in every[0].deviation}
    figures = {"deviation": deviation_figure([s.radius for s in every], deviation, "deviation against tolerance, by subject")}
    layers = list(every[0].by_layer)
    by_layer = {form: [fmean(s.by_layer[layer][form] for s in every) for layer in layers] for form in deviation}
    figures["layers"] = curve_figure([int(x) for x in layers], by_layer, "layer", "D (eq. 5)", "deviation of one layer's change alone")
    for i, s in enumerate(s for s in every[:MOST] if s.conflict):
        names = [fact.prompt for fact in s.facts] if len(s.facts) == len(s.conflict) else [str(i + 1) for i in range(len(s.conflict))]
        figures[f"conflict_{i + 1}"] = matrix_figure(s.conflict, names, f"gradient conflict of the facts of {s.subject}")
    if len(keys) > 1:
        names = list(keys)[:MOST]
        cosine = similarity(torch.stack([keys[name] for name in names])).tolist()
        figures["similarity"] = matrix_figure(cosine, names, f"cosine of the subjects' keys (near: above {NEAR})", low=-1)
    return figures


def write_page(folder: str | Path, certificate: Certificate, keys: Mapping[str, Tensor]) -> Path:
    """Write each figure as PNG and certificate.html, which holds them and the tables, into a folder; returns the page's path."""
    pictures = {name: png(figure) for name, figure in figures_of(certificate, keys).items()}
    body = [table(*part) for part in tables(certificate, neighbours=3)] + [picture(name, drawn) for name, drawn in pictures.items()]
    told = f"R keeps every target at a probability of {certificate.kept} or more."
    page = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Certificate</title><link rel="icon" href="data:,">'
    page += f"<style>{STYLE}</style></head><body><h1>Certificate</h1><p>{told}</p>{''.join(body)}</body></html>\n"
    write_files(folder, {f"{name}.png": drawn for name, drawn in pictures.items()} | {"certificate.html": page.encode()})
    return Path(folder) / "certificate.html"
