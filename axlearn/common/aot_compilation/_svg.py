"""The few shapes of SVG that pictures of plans are made of."""

from collections.abc import Sequence
from typing import Optional
from xml.sax.saxutils import escape

_FONT = "font-family='Helvetica, Arial, sans-serif'"


def rect(
    x: float, y: float, width: float, height: float, *, fill: str, stroke: str = "none", title: str = ""
) -> str:
    """A rectangle; `title` shows where the pointer rests on it."""
    shape = f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(width, 0):.1f}' height='{height:.1f}' rx='2' "
    shape += f"fill='{fill}' stroke='{stroke}'"
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: int = 13,
    fill: str = "#222",
    anchor: str = "start",
    bold: bool = False,
) -> str:
    """A line of text whose baseline is at `y`; `anchor` is "start", "middle" or "end"."""
    weight = " font-weight='bold'" if bold else ""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {_FONT} font-size='{size}' fill='{fill}' text-anchor='{anchor}'{weight}>"
        f"{escape(content)}</text>"
    )


def line(
    x1: float, y1: float, x2: float, y2: float, *, stroke: str = "#222", dash: Optional[str] = None
) -> str:
    """A line; `dash` as in SVG's stroke-dasharray."""
    dashes = f" stroke-dasharray='{dash}'" if dash else ""
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{stroke}'{dashes}/>"


def picture(shapes: Sequence[str], *, width: float, height: float, title: str) -> str:
    """A whole file of shapes on white.

    Args:
        shapes: What the functions above return, those in front last.
        width: In pixels.
        height: Likewise.
        title: What the picture is called.
    """
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' height='{height:.0f}' "
        f"viewBox='0 0 {width:.0f} {height:.0f}'>",
        f"<title>{escape(title)}</title>",
        rect(0, 0, width, height, fill="#fff"),
        *shapes,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
