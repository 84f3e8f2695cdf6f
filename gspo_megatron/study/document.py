"""A study's report becomes files: report.html (self-contained), README.md with plots beside it, findings.json, and the
data that it was made from."""

import base64
import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from gspo_megatron.study import archive

DPI = 110


@dataclass(frozen=True)
class Section:
    """A section has a heading with text, a table and pictures, as the templates show it."""

    title: str
    text: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """Holds what a report says. The first sentence of the conclusion is the verdict."""

    title: str
    summary: str
    conclusion: list[str]
    sections: list[Section]
    figures: dict[str, Figure]
    findings: Any  # a dataclass, for programs


def write(document: Document, folder: Path) -> None:
    """Write the files over older ones."""
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    images = {}
    for name, figure in document.figures.items():
        picture = io.BytesIO()
        figure.savefig(picture, dpi=DPI)
        (plots / f"{name}.png").write_bytes(picture.getvalue())
        images[name] = base64.b64encode(picture.getvalue()).decode()
    loader = jinja2.PackageLoader("gspo_megatron.study")
    for template, target, escapes in (("report.html", "report.html", True), ("report.md", "README.md", False)):
        environment = jinja2.Environment(loader=loader, autoescape=escapes, trim_blocks=True)
        text = environment.get_template(template).render(document=document, images=images)
        (folder / target).write_text(text.rstrip() + "\n", encoding="utf-8")
    plain = json.dumps(dataclasses.asdict(document.findings), indent=1)
    (folder / "findings.json").write_text(plain + "\n", encoding="utf-8")
    archive.write(folder)
