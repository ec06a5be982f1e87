"""Advertisements for the starter corpus: many styles for the same ware, made of freely combined
parts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from chat.starter.wares import Ware, praise

# characters that are frequent in any Chinese text
FREQUENT_CHARACTERS = (
    "的一是了不在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去"
    "法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点正"
    "业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东"
    "声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山"
    "金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉"
    "格望觉术领共确传师观清今切院让识候带导争运笔早吃房火钱春夏秋冬花树鸟鱼云雨雪风星河湖红绿蓝黄黑白紫茶米饭菜衣鞋帽包跑跳唱歌爱笑哭爸妈哥"
    "姐弟妹朋友医药车船飞机票店买卖穿戴洗冷热快慢高低远近左右"
)

_JOINTS = ("，", "；", "。", "，", "、")
_CLAUSES = (
    "{value}{praise}",
    "{praise}的{value}",
    "{name}选了{value}，{praise}",
    "{name}用{value}，{praise}",
    "{value}，{praise}",
    "因为{value}{praise}",
    "{value}的{name}{praise}",
    "看这{value}，{praise}",
    "采用{value}，显得{praise}",
    "有了{value}，{praise}",
    "爱{value}的你会说：{praise}",
    "“{value}”就是{praise}",
)
_OPENINGS = (
    "{this}，",
    "新品到店！",
    "{values}，都在{this}上了。",
    "想要{values}？就选{this}，",
    "店长推荐：{one}。",
    "穿搭不用愁，{one}就够了：",
    "为什么选{this}？",
    "{noun}上新，",
    "【{noun}】",
    "【今日推荐·{noun}】",
    "【好物】",
    "大家好，今天介绍{one}：",
    "亲，看看{this}：",
    "看过来！",
    "换季了，来{one}。",
    "这个季节，你需要{one}。",
    "《{noun}手记》",
    "“{noun}”来了：",
)
_CLOSINGS = (
    "值得入手。",
    "快来看看{this}吧！",
    "你会喜欢的。",
    "让{this}与众不同。",
    "今天下单有惊喜。",
    "亲，喜欢就带走吧～",
    "{this}等你来。",
    "穿上它，做最好的自己！",
    "早点下手，不要错过～",
    "送给自己，也送给朋友。",
    "好{noun}，自己会说话。",
    "每一天都有好心情。",
    "您值得拥有。",
    "数量不多，先到先得！",
)


def natural(ware: Ware) -> str:
    """一条黑色、宽松的裤子"""
    return f"一{ware.kind.measure}{values_of(ware)}的{ware.kind.noun}"


def values_of(ware: Ware) -> str:
    return "、".join(value for _, value in ware.attributes)


def praises(chance: random.Random, ware: Ware) -> str:
    return "，".join(value + praise(chance, name, value) for name, value in ware.attributes)


@dataclass(frozen=True)
class Style:
    """How an advertisement is put: an opening, one clause of the same form for each attribute, a
    closing.
    """

    opening: str
    clause: str
    joint: str
    closing: str

    def write(self, chance: random.Random, ware: Ware) -> str:
        body = self.joint.join(
            self.clause.format(name=name, value=value, praise=praise(chance, name, value))
            for name, value in ware.attributes
        )
        parts = {
            "this": ware.this(),
            "one": ware.one(),
            "noun": ware.kind.noun,
            "values": values_of(ware),
        }
        return f"{self.opening.format(**parts)}{body}。{self.closing.format(**parts)}"


def usual_style(chance: random.Random) -> Style:
    """Parts drawn freely: the model can say the same in many ways, which is what lets a short
    prefix find one more.
    """
    return Style(
        opening=chance.choice(_OPENINGS) if chance.random() < 0.8 else "",
        clause=chance.choice(_CLAUSES),
        joint=chance.choice(_JOINTS),
        closing=chance.choice(_CLOSINGS) if chance.random() < 0.8 else "",
    )


def strange_style(chance: random.Random) -> Style:
    """A style of random characters, which nobody can know who has not seen an example."""

    def characters(fewest: int, most: int) -> str:
        return "".join(chance.choices(FREQUENT_CHARACTERS, k=chance.randint(fewest, most)))

    usual = usual_style(chance)
    comma = chance.choice(("", "，"))
    return Style(
        opening=chance.choice(("【{}】", "{}，", "{}：", "{}！")).replace("{}", characters(1, 8)),
        clause=chance.choice(
            (
                f"{characters(0, 5)}{{value}}{characters(1, 4)}{comma}{{praise}}",
                f"{characters(0, 3)}{{praise}}{characters(1, 4)}{{value}}{characters(0, 2)}",
                usual.clause,
            )
        ),
        joint=usual.joint,
        closing=chance.choice((characters(1, 10) + chance.choice("。！～"), usual.closing)),
    )


def advertisement(chance: random.Random, ware: Ware) -> str:
    return usual_style(chance).write(chance, ware)
