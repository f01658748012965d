"""Reads a page, and holds it to what every page must be."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "br", "hr", "col"}
FORBIDDEN = ("script", "iframe", "img", "link", "object", "embed", "base", "form", "use", "image", "foreignObject")


class Document(HTMLParser):
    """Reads a page with a stack: every element closed in order; keeps elements, texts and the raw SVGs."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.stack == []
        self.svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} repeats an attribute"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.stack[-1] if self.stack else "", data))

    def text(self) -> str:
        told = " ".join(data for parent, data in self.texts if parent != "style")
        return told.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def check(page: str) -> Document:
    """Well-formed, self-contained, accessible: what every page must be."""
    document = Document(page)
    for svg in document.svgs:
        ElementTree.fromstring(svg)
    assert not [name for name, _ in document.elements if name in FORBIDDEN]
    for name, attributes in document.elements:
        assert not {"src", "srcset", "style", "action", "xlink:href"} & set(attributes), name
        assert not [key for key in attributes if key.startswith("on")], name
        assert (attributes.get("href") or "#").startswith("#"), name
    styles = "".join(data for parent, data in document.texts if parent == "style")
    assert "url(" not in styles and "@import" not in styles and "@font-face" not in styles
    anchors = {attributes["id"] for _, attributes in document.elements if "id" in attributes}
    assert all((a["href"] or "")[1:] in anchors for a in document.all("a"))
    assert len(anchors) == sum("id" in attributes for _, attributes in document.elements)
    assert all(
        a.get("aria-hidden") == "true" or (a.get("role") == "img" and a.get("aria-label")) for a in document.all("svg")
    )
    assert all(a.get("scope") in ("col", "row") for a in document.all("th"))
    headings = [int(name[1]) for name, _ in document.elements if re.fullmatch("h[1-6]", name)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings))
    return document
