"""A drawing's SVG made fit for a page: no font files, no foreign ids, colours that follow light and dark.

Knows the SVG that matplotlib writes; knows nothing of what is drawn.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "{http://www.w3.org/1999/xlink}href"
# An id that begins so names what an element is for; it becomes a class.
ROLE = "role-"
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_FONT_FAMILY = re.compile(r"font-family:[^;]*;?\s*")


def page_svg(
    drawn: str, *, name: str, title: str, description: str, colours: Mapping[str, str], inline_style: str | None = None
) -> str:
    """Return the SVG element of a drawing.

    Args:
        drawn: What matplotlib wrote, text as text.
        name: Unique on a page: ids begin with it.
        title: What the drawing shows.
        description: What a reader who does not see it should know.
        colours: What stands for a colour of the drawing, such as `currentColor`.
        inline_style: Rules for a file that stands alone; None in a page, whose rules hold for all.
    """
    root = ET.fromstring(drawn)  # noqa: S314 - written by this very program
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{_SVG}}}")
    _drop(root, ("metadata", "style"))
    used = _referenced(root)
    for element in root.iter():
        _rename(element, name, used)
        _restyle(element, colours)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib = {
        "xmlns": _SVG,
        "viewBox": root.attrib["viewBox"],
        "width": width,
        "height": height,
        "role": "img",
        "aria-label": f"{title}. {description}",
        "font-family": _FONTS,
    }
    if inline_style is not None:
        style = ET.Element("style")
        style.text = inline_style
        root.insert(0, style)
    return ET.tostring(root, encoding="unicode")


def _drop(root: ET.Element, tags: tuple[str, ...]) -> None:
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in tags]:
            parent.remove(child)
        for child in [child for child in parent if child.tag == "defs" and not len(child)]:
            parent.remove(child)


def _referenced(root: ET.Element) -> set[str]:
    """Name the ids that something in the drawing uses."""
    used = set()
    for element in root.iter():
        used.add(element.attrib.get(_XLINK, "").removeprefix("#"))
        for value in element.attrib.values():
            used.update(_REFERENCE.findall(value))
    return used


def _rename(element: ET.Element, name: str, used: set[str]) -> None:
    own = element.attrib.pop("id", "")
    if own in used and own:
        element.set("id", f"{name}-{own}")
    elif own.startswith(ROLE):
        element.set("class", own)
    target = element.attrib.pop(_XLINK, None)
    if target is not None:
        element.set("href", f"#{name}-{target[1:]}" if target.startswith("#") else target)
    for attribute, value in element.attrib.items():
        if "url(#" in value:
            element.set(attribute, _REFERENCE.sub(rf"url(#{name}-\1)", value))


def _restyle(element: ET.Element, colours: Mapping[str, str]) -> None:
    style = element.attrib.get("style")
    if style is not None:
        style = _FONT_FAMILY.sub("", style)
        for drawn, shown in colours.items():
            style = style.replace(drawn, shown)
        element.set("style", style.strip())
    if element.attrib.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if "d" in element.attrib:
        element.set("d", " ".join(element.attrib["d"].split()))
