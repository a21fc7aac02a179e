"""A page read as a browser reads it: elements in their places, or an error where they do not nest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = (
    "<script>document.title='owned'</script>",
    "</title></svg></style></main><script>document.title='owned'</script>",
    "\"'><img src=http://127.0.0.1:{port}/quote onerror=document.title='owned'>",
    "<img src=http://127.0.0.1:{port}/plain>",
    "' onmouseover='document.title=1' x='",
    "javascript:document.title='owned'",
    "{{{{ 7 * 7 }}}}{{% for x in y %}}",
    "]]><!--",
    "&lt;script&gt;&#x3c;b",
    "\u202etxt.exe\u2066",
    "\x00\x1b[31m\x7f\x9b\u2028",
    "\ud800",
    "שלום عربي",
    "e" + "\u0301" * 500,
    "漢字" * 300,
)


@dataclass
class Element:
    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Element]:
        """All elements in it, in order."""
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, wanted: str | Callable[[Element], bool]) -> list[Element]:
        """Those of a class, or that something is true of."""
        return [e for e in self if (wanted in e.classes if isinstance(wanted, str) else wanted(e))]

    def one(self, wanted: str | Callable[[Element], bool]) -> Element:
        (found,) = self.all(wanted)
        return found


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.stack = [Element("")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]], ended: bool = False) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice: {names}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.stack[-1].children.append(element)
        if tag not in VOID and not ended:
            self.stack.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs, ended=True)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1].tag == tag, f"</{tag}> within {self.stack[-1].tag}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.stack[-1].children.append(data)


def parse(page: str) -> Element:
    parser = _Parser()
    parser.feed(page)
    parser.close()
    (root,) = parser.stack
    return root
