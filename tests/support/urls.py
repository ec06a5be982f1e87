"""Every URL of the site, read from the URL conf, so that a test cannot forget a new one."""

import re
from dataclasses import dataclass

from django.urls import get_resolver


@dataclass(frozen=True)
class Route:
    """`path` with {pk} where it takes a row's id and a name where it takes one."""

    path: str
    name: str | None

    def of(self, pk) -> str:
        return self.path.replace("{pk}", str(pk))


def routes(patterns=None, prefix="/") -> list[Route]:
    found = []
    for each in get_resolver().url_patterns if patterns is None else patterns:
        text = re.sub(r"\(\?P<pk>[^)]*\)|<int:pk>", "{pk}", str(each.pattern))
        text = re.sub(r"<\w+(:\w+)?>", "x", text).replace("\\", "")
        path = prefix + text.strip("^$")
        if hasattr(each, "url_patterns"):
            found += routes(each.url_patterns, path)
        else:
            found.append(Route(path, each.name))
    return found
