"""Made-up wares that the starter corpus and the sample dataset talk about.

A ware is a kind of clothing, shoe or bag with a few attributes. It can be written as an attribute
string, the form which advertising datasets use: `类型#裤*颜色#黑色*材质#棉`. Names and phrases were
written
for this project.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

KIND = "类型"


@dataclass(frozen=True)
class Kind:
    """A kind of ware: its name in an attribute string, its noun and measure word in a sentence, its
    attributes in order.
    """

    name: str
    noun: str
    measure: str
    attributes: tuple[str, ...]


COMMON_ATTRIBUTES = ("材质", "颜色", "风格", "图案")

KINDS = (
    Kind("上衣", "上衣", "件", ("版型", *COMMON_ATTRIBUTES, "衣样式", "衣长", "衣袖长", "衣领型")),
    Kind("裤", "裤子", "条", ("版型", *COMMON_ATTRIBUTES, "裤长", "裤型", "裤腰型")),
    Kind("裙", "裙子", "条", ("版型", *COMMON_ATTRIBUTES, "裙长", "裙型", "裙腰型")),
    Kind("鞋", "鞋子", "双", (*COMMON_ATTRIBUTES, "鞋跟", "鞋头")),
    Kind("包", "包包", "只", (*COMMON_ATTRIBUTES, "包型", "背法")),
)

# attribute -> value -> (what people usually say of it, what they sometimes say of it)
VALUES: dict[str, dict[str, tuple[str, str]]] = {
    "版型": {
        "宽松": ("不挑身材", "活动自如"),
        "修身": ("勾勒曲线", "贴合身形"),
        "直筒": ("显得笔直", "遮住赘肉"),
        "显瘦": ("藏起小肚子", "看着轻十斤"),
        "合体": ("穿着刚刚好", "不松也不紧"),
    },
    "材质": {
        "棉": ("柔软透气", "亲肤吸汗"),
        "麻": ("凉爽干燥", "自然朴素"),
        "真丝": ("顺滑有光泽", "轻得像没穿"),
        "羊毛": ("保暖厚实", "绵软不扎人"),
        "牛仔布": ("结实耐磨", "越洗越好看"),
        "雪纺": ("轻盈飘逸", "垂感很好"),
        "针织": ("有弹性不勒人", "柔和温暖"),
        "蕾丝": ("精致浪漫", "若隐若现"),
        "真皮": ("挺括有型", "越用越亮"),
        "帆布": ("轻便耐用", "不怕磕碰"),
        "灯芯绒": ("纹理温暖", "厚而不重"),
        "聚酯纤维": ("不易起皱", "洗了就干"),
    },
    "颜色": {
        "黑色": ("显瘦耐看", "沉稳大气"),
        "白色": ("干净清爽", "明亮纯洁"),
        "红色": ("喜庆亮眼", "热情如火"),
        "蓝色": ("沉静大方", "像晴天一样"),
        "绿色": ("清新自然", "生机勃勃"),
        "粉色": ("甜美减龄", "衬得气色好"),
        "灰色": ("低调百搭", "高级不张扬"),
        "黄色": ("活泼明亮", "一眼就看到"),
        "紫色": ("神秘优雅", "浪漫少见"),
        "米色": ("温柔耐脏", "和谁都相配"),
        "藏青色": ("稳重显白", "深沉耐看"),
        "咖啡色": ("暖和复古", "秋天的味道"),
    },
    "风格": {
        "简约": ("利落大方", "少即是多"),
        "复古": ("别有韵味", "像老电影"),
        "休闲": ("轻松自在", "周末最合适"),
        "通勤": ("得体干练", "上班不失礼"),
        "文艺": ("安静有气质", "像一首诗"),
        "街头": ("个性十足", "酷得有理"),
        "运动": ("活力满满", "跑跳都方便"),
        "甜美": ("俏皮可爱", "笑起来更甜"),
        "中国风": ("古典雅致", "东方韵味"),
        "英伦": ("绅士有礼", "学院气息"),
        "性感": ("迷人有魅力", "自信动人"),
        "清新": ("如沐春风", "看着就舒服"),
    },
    "图案": {
        "纯色": ("怎么搭都行", "简单不出错"),
        "条纹": ("拉长身形", "节奏分明"),
        "格子": ("青春有朝气", "经典不过时"),
        "印花": ("热闹有趣", "走到哪都亮"),
        "碎花": ("温柔浪漫", "像春天的田野"),
        "刺绣": ("做工细腻", "一针一线都用心"),
        "波点": ("灵动活泼", "跳跃有趣"),
        "卡通": ("童趣十足", "一见就开心"),
        "字母": ("随性有态度", "一句话的心情"),
        "拼接": ("层次丰富", "混搭有新意"),
        "线条": ("干净利索", "勾出轮廓"),
    },
    "衣样式": {
        "衬衫": ("正式也随意", "领口挺拔"),
        "卫衣": ("舒服好动", "懒人最爱"),
        "毛衣": ("温暖贴心", "冬天离不开"),
        "外套": ("挡风又好看", "随手一披"),
        "风衣": ("走路带风", "潇洒修长"),
        "西装": ("精神体面", "气场在线"),
        "t恤": ("百穿不厌", "夏天必备"),
    },
    "衣长": {
        "短款": ("显高显腿长", "轻快利索"),
        "常规": ("日常好穿", "长度正好"),
        "中长款": ("遮臀显瘦", "飘逸大方"),
    },
    "衣袖长": {
        "短袖": ("清凉方便", "露出手臂线条"),
        "长袖": ("挡风防晒", "保护手臂"),
        "七分袖": ("露出手腕", "做事利索"),
        "无袖": ("凉快大胆", "一身轻松"),
    },
    "衣领型": {
        "圆领": ("简单亲切", "穿脱方便"),
        "v领": ("修饰脸型", "脖子显长"),
        "翻领": ("端庄整齐", "有精神"),
        "立领": ("挺拔有范", "护住脖子"),
        "高领": ("暖到下巴", "不怕冷风"),
        "方领": ("露出锁骨", "复古优雅"),
    },
    "裤长": {
        "长裤": ("四季都能穿", "修长笔挺"),
        "九分裤": ("露出脚踝", "显得轻快"),
        "七分裤": ("凉快不拖沓", "走路利落"),
        "短裤": ("夏天更清凉", "露出长腿"),
    },
    "裤型": {
        "阔腿裤": ("走路生风", "藏住腿粗"),
        "直筒裤": ("腿型笔直", "怎么穿都稳"),
        "哈伦裤": ("上松下紧", "蹲下也不勒"),
        "喇叭裤": ("拉长小腿", "复古摇摆"),
        "小脚裤": ("腿部更细", "好塞靴子"),
        "背带裤": ("减龄可爱", "不用系皮带"),
    },
    "裤腰型": {
        "高腰": ("腰细腿长", "收住小腹"),
        "中腰": ("坐下不卡", "舒适刚好"),
        "松紧腰": ("吃饱也不勒", "胖瘦都能穿"),
    },
    "裙长": {
        "长裙": ("优雅飘动", "遮住小腿"),
        "中长裙": ("端庄好走路", "不长也不短"),
        "短裙": ("青春俏丽", "腿更显长"),
        "连衣裙": ("一件就出门", "省心又漂亮"),
    },
    "裙型": {
        "百褶裙": ("褶子会跳舞", "学生气十足"),
        "a字裙": ("遮住大腿", "收腰放摆"),
        "鱼尾裙": ("曲线动人", "走动如水"),
        "伞裙": ("转圈像花开", "蓬松可爱"),
        "吊带裙": ("肩颈好看", "清凉一夏"),
        "包臀裙": ("凸显身材", "成熟大方"),
    },
    "裙腰型": {
        "高腰": ("腰细腿长", "收住小腹"),
        "自然腰": ("不紧不松", "自在呼吸"),
        "松紧腰": ("吃饱也不勒", "胖瘦都能穿"),
    },
    "鞋跟": {
        "平跟": ("久走不累", "开车也方便"),
        "高跟": ("身姿挺拔", "高出一截"),
        "坡跟": ("稳当增高", "不怕崴脚"),
        "厚底": ("软弹有力", "踩着像云"),
    },
    "鞋头": {
        "圆头": ("脚趾宽敞", "可爱不挤脚"),
        "尖头": ("秀气显瘦", "气质利落"),
        "方头": ("时髦复古", "宽脚友好"),
    },
    "包型": {
        "手提包": ("一拎就走", "端庄得体"),
        "水桶包": ("看着小装得多", "圆圆的可爱"),
        "托特包": ("电脑也放得下", "装下一天"),
        "腰包": ("解放双手", "贴身安全"),
    },
    "背法": {
        "单肩": ("随手一挎", "优雅自如"),
        "斜挎": ("出门不怕掉", "骑车也安心"),
        "双肩": ("肩上不累", "上学旅行都行"),
    },
}


@dataclass(frozen=True)
class Ware:
    """One ware: its kind and its attributes in order, without the kind itself."""

    kind: Kind
    attributes: tuple[tuple[str, str], ...]

    def attribute_string(self) -> str:
        pairs = ((KIND, self.kind.name), *self.attributes)
        return "*".join(f"{name}#{value}" for name, value in pairs)

    def value_of(self, attribute: str) -> str | None:
        return dict(self.attributes).get(attribute)

    def one(self) -> str:
        """The ware with its measure word: 一条裤子."""
        return f"一{self.kind.measure}{self.kind.noun}"

    def this(self) -> str:
        """The ware pointed at: 这条裤子."""
        return f"这{self.kind.measure}{self.kind.noun}"


def draw_ware(
    chance: random.Random, fewest: int = 1, most: int = 6, *, shuffled: float = 0.0
) -> Ware:
    """A random ware with `fewest`..`most` attributes, in the usual order or (with that probability)
    shuffled.
    """
    kind = chance.choice(KINDS)
    known = kind.attributes
    count = min(chance.randint(fewest, most), len(known))
    chosen = sorted(chance.sample(range(len(known)), count))
    if chance.random() < shuffled:
        chance.shuffle(chosen)
    return Ware(
        kind, tuple((known[index], chance.choice(list(VALUES[known[index]]))) for index in chosen)
    )


def praise(chance: random.Random, attribute: str, value: str, *, usual: float = 0.75) -> str:
    """What is said of a value: the usual phrase with that probability, else the other one."""
    phrases = VALUES[attribute][value]
    return phrases[0] if chance.random() < usual else phrases[1]
