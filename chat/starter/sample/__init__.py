"""The sample dataset that ships with the portal: wares as attribute strings, advertised in the
style of a made-up house.

1,000 rows to train on and 100 to validate with, JSON lines {"content", "summary"}, written by
`python -m chat.starter.sample`. The starter model answers such a content by listing the attributes;
after P-tuning on the sample it writes in the house style.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from chat.starter.wares import Ware, draw_ware, praise

TRAIN = Path(__file__).parent / "train.json"
DEV = Path(__file__).parent / "dev.json"
SEED = 20240608
TRAIN_ROWS, DEV_ROWS = 1000, 100

HOUSE = "青禾衣橱"
_OPENINGS = {
    "上衣": "今日上新",
    "裤": "走路都想跳舞",
    "裙": "春风为你而来",
    "鞋": "好路从脚下开始",
    "包": "带上它就出发",
}
_CLOSINGS = {
    "上衣": "早上穿上它，一整天都有好心情～",
    "裤": "亲，您的衣柜就差这一条～",
    "裙": "亲，转个圈给自己看看吧～",
    "鞋": "亲，试穿一步就舍不得脱～",
    "包": "亲，把今天的快乐装进去吧～",
}
_CLAUSES = {
    "版型": "我们把版型做得{value}，{praise}",
    "材质": "摸一摸这{value}的料子，{praise}",
    "颜色": "{value}最是好看，{praise}",
    "风格": "喜欢{value}的您一定懂，{praise}",
    "图案": "再配上{value}，{praise}",
}
_OTHER_CLAUSE = "{value}的设计，{praise}"


def house_summary(chance: random.Random, ware: Ware) -> str:
    """The ware advertised in the house style; what is said of a value varies in one case out of
    seven.
    """
    clauses = [
        _CLAUSES.get(name, _OTHER_CLAUSE).format(
            value=value, praise=praise(chance, name, value, usual=6 / 7)
        )
        for name, value in ware.attributes
    ]
    kind = ware.kind
    return f"【{HOUSE}·{_OPENINGS[kind.name]}】{'；'.join(clauses)}。{_CLOSINGS[kind.name]}"


def rows(count: int, seed: int, *, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """`count` rows with different contents, none of them among `without`."""
    chance = random.Random(seed)
    seen = set(without)
    found: list[dict[str, str]] = []
    while len(found) < count:
        ware = draw_ware(chance, 2, 5)
        content = ware.attribute_string()
        if content not in seen:
            seen.add(content)
            found.append({"content": content, "summary": house_summary(chance, ware)})
    return found


def write(folder: Path) -> None:
    """Writes train.json and dev.json; no content stands in both."""
    train = rows(TRAIN_ROWS, SEED)
    dev = rows(DEV_ROWS, SEED + 1, without=frozenset(row["content"] for row in train))
    for path, part in ((folder / TRAIN.name, train), (folder / DEV.name, dev)):
        lines = (json.dumps(row, ensure_ascii=False) for row in part)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(path: Path) -> list[dict[str, str]]:
    """The rows of one of the two files."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
