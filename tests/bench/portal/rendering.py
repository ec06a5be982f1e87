"""What rendering an answer while it is written costs the web process."""

import time

from chat.conversations.rendering import to_html
from chat.conversations.streaming import StreamedMarkdown

PIECE = 2  # characters of a token
ANSWER = (
    """## 步骤

先把提示按 `*` 切开，**再**按第一个 `#` 切分名和值；见 \\(n = 3\\) 时的例子，别的情形一样。

- 一项，**粗**，`代码`，和更多的文字一直写到行尾
- 另一项，也有差不多长的一句话在后面跟着
- 还有一项

```python
def parse(text):
    return dict(part.split("#", 1) for part in text.split("*"))
```

| 列 | 值 |
|---|---|
| 类型 | 裤 |
| 颜色 | 米白 |

"""
    * 8
)


def measure(rounds: int) -> dict[str, float]:
    """us of CPU per token of a 2,000-character answer, and how often its final rendering that
    is.
    """
    to_html(ANSWER)  # what is loaded once
    begun = time.process_time()
    for _round in range(rounds):
        to_html(ANSWER)
    once = (time.process_time() - begun) / rounds
    begun = time.process_time()
    for _round in range(rounds):
        markdown = StreamedMarkdown()
        for end in range(PIECE, len(ANSWER), PIECE):
            markdown.grow(ANSWER[:end])
    streamed = (time.process_time() - begun) / rounds
    return {
        "rendering_us_per_token": 1e6 * streamed / (len(ANSWER) / PIECE),
        "rendering_streamed_to_once": streamed / once,
    }
