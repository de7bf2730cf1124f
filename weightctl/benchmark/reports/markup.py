"""Elements of a page or a picture, made so that no text can become markup."""

from __future__ import annotations

from importlib import resources
from xml.etree.ElementTree import Element

Child = Element | str | None


def tag(name: str, *children: Child, **attributes: str | float | None) -> Element:
    """`tag("a", "text", href="…")`. `class_` stands for `class`, `text_anchor` for `text-anchor`; None is left out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    element = Element(name, {key: printable(f"{value}") for key, value in given.items()})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif child and len(element):
            element[-1].tail = (element[-1].tail or "") + printable(child)
        elif child:
            element.text = (element.text or "") + printable(child)
    return element


def printable(text: str) -> str:
    """What cannot be shown, spelt out: control characters, those that turn the direction of text, lone surrogates."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def style(*names: str) -> str:
    """This package's style sheets of these names, one after the other, on one line."""
    return " ".join(" ".join(resources.files(__package__).joinpath(name).read_text().split()) for name in names)
