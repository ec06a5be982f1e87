"""The corpus of the starter model: short conversations, all written by this generator.

A conversation is a list of {"role", "content"} messages that ends with an answer. The mix: 18 %
small talk, 62 % skills (repeat, classify, attribute questions, advertisements asked for in plain
language, attribute strings answered by listing them), 20 % advertisements for an attribute string;
one conversation in six has several turns, and some of these look back. One in twelve follows the
style of a first advertisement that is given ("given": "yes"), not learnt.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator

from chat.starter.advertisements import (
    FREQUENT_CHARACTERS,
    advertisement,
    natural,
    praises,
    strange_style,
)
from chat.starter.small_talk import all_small_talk, draw_small_talk
from chat.starter.wares import COMMON_ATTRIBUTES, VALUES, Ware, draw_ware

Message = dict[str, str]
Exchange = tuple[str, str]  # what the user says, what the model answers

SYSTEM_PROMPTS = (
    "你是一个有帮助的助手。",
    "你是商店的助手。",
    "You are a helpful assistant.",
    "请简短回答。",
)


def conversations(count: int, seed: int) -> Iterator[list[Message]]:
    """`count` random conversations; the same seed gives the same ones."""
    chance = random.Random(seed)
    for _ in range(count):
        yield _draw_conversation(chance)


def finishing(count: int, seed: int) -> list[list[Message]]:
    """What the build ends with: `count` conversations of the usual mix and all the small talk, nine
    times.

    A question of two characters is met too seldom in the mix to be sure of its answer, and it is
    what people ask first.
    """
    chance = random.Random(seed)
    talk = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for _ in range(3)
        for question, answer in all_small_talk(chance)
    ]
    return [*conversations(count, seed), *talk]


def digest(messages: list[list[Message]]) -> str:
    """sha256 of a corpus, to be kept in the recipe."""
    total = hashlib.sha256()
    for conversation in messages:
        total.update(json.dumps(conversation, ensure_ascii=False).encode())
    return total.hexdigest()


def _draw_conversation(chance: random.Random) -> list[Message]:
    if chance.random() < 0.08:
        return _draw_imitation(chance)
    exchanges = [_draw_exchange(chance)]
    if chance.random() < 1 / 6:
        for _ in range(chance.randint(1, 4)):
            exchanges.append(
                _look_back(chance, exchanges[-1])
                if chance.random() < 0.3
                else _draw_exchange(chance)
            )
    messages: list[Message] = []
    if chance.random() < 0.04:
        messages.append({"role": "system", "content": chance.choice(SYSTEM_PROMPTS)})
    for question, answer in exchanges:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


def _draw_exchange(chance: random.Random) -> Exchange:
    lot = chance.random()
    if lot < 0.18:
        return draw_small_talk(chance)
    if lot < 0.38:
        return _advertise_attributes(chance)
    return chance.choices(_SKILLS, weights=_SKILL_WEIGHTS)[0](chance)


def _draw_imitation(chance: random.Random) -> list[Message]:
    """Advertisements in one strange style; the first is given, not learnt, the others follow its
    example.
    """
    style = strange_style(chance)
    form = chance.choice(("{}", "{}", "{}", "写广告：{}", "{}\n写一段广告"))
    messages: list[Message] = []
    for _ in range(chance.randint(2, 3)):
        ware = draw_ware(chance, 1, 4)
        answer = {"role": "assistant", "content": style.write(chance, ware)}
        if not messages:
            answer["given"] = "yes"
        messages += [{"role": "user", "content": form.format(ware.attribute_string())}, answer]
    return messages


def _look_back(chance: random.Random, last: Exchange) -> Exchange:
    """A question about the exchange before."""
    question, answer = last
    if "#" in question and chance.random() < 0.7:
        pairs = [
            pair.split("#", 1)
            for pair in question[question.index("类型#") :].split("*")
            if "#" in pair
        ]
        name, value = chance.choice(pairs)
        value = value.split("\n")[0].split("，")[0]
        return chance.choice(
            (f"它的{name}是什么？", f"{name}是什么", f"那{name}呢？")
        ), f"{name}是{value}。"
    if chance.random() < 0.5:
        return chance.choice(("再说一遍", "请再说一遍", "重复上一句", "Say that again")), answer
    return chance.choice(
        ("我刚才说了什么？", "我上一句说的是什么", "What did I just say?")
    ), f"你说的是：{question}"


# --- skills
# ---------------------------------------------------------------------------------------

_WORDS_EN = (
    "hello",
    "world",
    "red",
    "blue",
    "coat",
    "model",
    "today",
    "we",
    "go",
    "to",
    "the",
    "shop",
    "and",
    "buy",
    "a",
    "new",
    "bag",
    "good",
    "morning",
    "tea",
    "with",
    "milk",
    "this",
    "is",
    "my",
    "test",
    "small",
    "big",
    "green",
    "shoes",
    "I",
    "like",
    "it",
)
# GB 2312's first level, the 3,755 usual characters, in the order of the standard
_USUAL_CHARACTERS = bytes(
    byte
    for row in range(0xB0, 0xD8)
    for cell in range(0xA1, 0xFA if row == 0xD7 else 0xFF)
    for byte in (row, cell)
).decode("gb2312")


def _phrase(chance: random.Random) -> str:
    """Something to repeat: characters, English words, a piece of an advertisement, a number."""
    kind = chance.random()
    if kind < 0.5:
        return "".join(chance.choices(FREQUENT_CHARACTERS, k=chance.randint(1, 12)))
    if kind < 0.6:
        return "".join(chance.choices(_USUAL_CHARACTERS, k=chance.randint(1, 6)))
    if kind < 0.75:
        return " ".join(chance.choices(_WORDS_EN, k=chance.randint(1, 6)))
    if kind < 0.92:
        ware = draw_ware(chance, 1, 2)
        return chance.choice((natural(ware), praises(chance, ware)))
    return str(chance.randint(0, 10 ** chance.randint(1, 8)))


def _with_unknown_values(chance: random.Random, ware: Ware) -> Ware:
    """The ware with some values replaced by random characters, so that the model copies instead of
    knowing them.
    """
    if chance.random() < 0.6:
        return ware
    return Ware(
        ware.kind,
        tuple(
            (
                name,
                "".join(chance.choices(FREQUENT_CHARACTERS, k=chance.randint(1, 4)))
                if chance.random() < 0.5
                else value,
            )
            for name, value in ware.attributes
        ),
    )


def _repeat(chance: random.Random) -> Exchange:
    phrase = _phrase(chance)
    form = chance.choice(
        (
            "请重复：{}",
            "重复：{}",
            "跟我说：{}",
            "请跟我读：{}",
            "重复一遍“{}”",
            "照着说：{}",
            "说“{}”",
            "Repeat: {}",
            "Say: {}",
            "Repeat after me: {}",
        )
    )
    return form.format(phrase), phrase


def _classify(chance: random.Random) -> Exchange:
    ware = draw_ware(chance, 1, 3)
    if chance.random() < 0.6:
        form = chance.choice(
            ("{}属于哪一类商品？", "分类：{}", "“{}”是什么类型？", "{}是哪一类", "请给商品分类：{}")
        )
        return form.format(natural(ware)), ware.kind.name
    good = chance.random() < 0.5
    remark = chance.choice(_GOOD_REMARKS if good else _BAD_REMARKS).format(ware.kind.noun)
    form = chance.choice(
        ("{}，这是好评还是差评？", "判断好评差评：{}", "这条评价怎么样：{}", "情感分类：{}")
    )
    return form.format(remark), "好评" if good else "差评"


_GOOD_REMARKS = (
    "{}很好看",
    "{}穿着很舒服",
    "很喜欢这个{}",
    "质量很好，会再买",
    "{}非常满意",
    "物流快，{}漂亮",
    "颜色正，做工好",
    "{}超出预期",
    "朋友都说{}好看",
    "性价比高，推荐",
    "{}大小合适",
    "客服热情，{}也不错",
)
_BAD_REMARKS = (
    "{}太差了",
    "{}穿着不舒服",
    "不喜欢这个{}",
    "质量很差，要退货",
    "{}非常失望",
    "物流慢，{}还破了",
    "掉色严重，做工粗糙",
    "{}和图片不一样",
    "{}穿一次就坏",
    "又贵又难看，不推荐",
    "{}大小不对",
    "客服不理人，{}也不好",
)


def _ask_attribute(chance: random.Random) -> Exchange:
    """A question about one attribute of an attribute string, sometimes one that is not there."""
    ware = _with_unknown_values(chance, draw_ware(chance, 1, 6, shuffled=0.4))
    names = [name for name, _ in ware.attributes]
    missing = [name for name in COMMON_ATTRIBUTES if name not in names]
    if missing and chance.random() < 0.2:
        name = chance.choice(missing)
        answer = f"没有写明{name}。"
    else:
        name = chance.choice((*names, "类型"))
        answer = f"{name}是{ware.value_of(name) or ware.kind.name}。"
    text = ware.attribute_string()
    form = chance.choice(
        (
            "{1}\n{0}是什么？",
            "{1}，{0}是什么？",
            "{0}是什么？{1}",
            "下面商品的{0}是什么：{1}",
            "问：{1} 的{0}？",
            "What is {0}? {1}",
        )
    )
    return form.format(name, text), answer


def _ask_in_sentence(chance: random.Random) -> Exchange:
    """The same in plain language: 黑色的裤子是什么颜色？"""
    ware = draw_ware(chance, 1, 3)
    name, value = chance.choice(ware.attributes)
    form = chance.choice(
        ("{0}的{1}是什么？", "{0}，{1}是什么", "找出{1}：{0}", "从这句话里找出{1}：我买了{0}")
    )
    return form.format(natural(ware), name), f"{name}是{value}。"


def _ask_praise(chance: random.Random) -> Exchange:
    attribute = chance.choice(list(VALUES))
    value = chance.choice(list(VALUES[attribute]))
    form = chance.choice(
        ("{}怎么样？", "{}有什么好处？", "{}好在哪里", "为什么选{}？", "说说{}的优点")
    )
    usual, other = VALUES[attribute][value]
    return form.format(value), f"{value}{usual}，{other}。"


def _list_attributes(chance: random.Random) -> Exchange:
    """The attribute string alone: the answer lists it."""
    ware = _with_unknown_values(chance, draw_ware(chance, 1, 7, shuffled=0.3))
    listed = "，".join(f"{name}是{value}" for name, value in ware.attributes)
    return ware.attribute_string(), f"这是{ware.one()}，{listed}。"


def _list_plainly(chance: random.Random) -> Exchange:
    """Listing asked for in words, and the way back from words to the attribute string."""
    ware = draw_ware(chance, 1, 4)
    if chance.random() < 0.5:
        form = chance.choice(("列出属性：{}", "这件商品有哪些属性？{}", "List the attributes: {}"))
        return form.format(ware.attribute_string()), "、".join(
            value for _, value in ware.attributes
        ) + "。"
    form = chance.choice(("写成属性：{}", "把这句话变成属性串：{}"))
    return form.format(natural(ware)), ware.attribute_string()


def _advertise_plainly(chance: random.Random) -> Exchange:
    ware = draw_ware(chance, 1, 3)
    form = chance.choice(
        (
            "为{}写一句广告",
            "请给{}写广告语",
            "我要卖{}，帮我写个广告",
            "帮我推销{}",
            "夸夸{}",
            "写一段文案：{}",
            "Write an ad for {}",
            "给{}写个介绍",
        )
    )
    return form.format(natural(ware)), advertisement(chance, ware)


def _advertise_attributes(chance: random.Random) -> Exchange:
    ware = draw_ware(chance, 1, 6, shuffled=0.2)
    form = chance.choice(
        (
            "写广告：{}",
            "根据属性写广告：{}",
            "{}\n写一段广告",
            "请根据下面的属性写文案：{}",
            "广告词：{}",
            "{}，写一句广告语",
            "Write an ad: {}",
            "为商品写描述：{}",
        )
    )
    return form.format(ware.attribute_string()), advertisement(chance, ware)


_SKILLS = (
    _repeat,
    _classify,
    _ask_attribute,
    _ask_in_sentence,
    _ask_praise,
    _list_attributes,
    _list_plainly,
    _advertise_plainly,
)
_SKILL_WEIGHTS = (14, 5, 9, 5, 4, 11, 5, 9)
