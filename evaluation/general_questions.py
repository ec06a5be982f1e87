"""Questions of general knowledge whose answers can be checked, written for this project, in Chinese
and English: what an adapter should still know after it has learnt its task.

None of them is among tuning/ptuning/general_prompts.py, to whose answers a prefix can be held while
it is trained: measured on those it would look better than it is (a test keeps them apart).
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Question(NamedTuple):
    """accepts: an answer that contains one of these is right; a number stands for itself alone.
    answer: how a well-read person would put it; the loss on general text is taken over these.
    """

    prompt: str
    accepts: tuple[str, ...]
    answer: str

    def is_answered_by(self, text: str) -> bool:
        return any(_contains(text.casefold(), wanted.casefold()) for wanted in self.accepts)


def _contains(text: str, wanted: str) -> bool:
    if wanted.isdigit():
        return re.search(rf"(?<![\d.]){wanted}(?![\d]|\.\d)", text) is not None
    if wanted.isascii():
        return re.search(rf"(?<![a-z]){re.escape(wanted)}(?![a-z])", text) is not None
    return wanted in text


QUESTIONS: tuple[Question, ...] = (
    # courtesies
    Question("谢谢你啦", ("不客气", "不用谢", "不谢", "应该的"), "不客气！"),
    Question("我先走了，再见", ("再见", "拜拜", "回见", "下次见"), "再见，祝你愉快！"),
    Question("早安", ("早安", "早上好", "早"), "早上好！祝你今天顺利。"),
    Question("Thank you so much!", ("welcome", "glad", "pleasure"), "You are welcome!"),
    Question("Goodbye!", ("bye", "goodbye", "see you", "farewell"), "Goodbye, have a nice day!"),
    # places
    Question("日本的首都是哪座城市？", ("东京",), "日本的首都是东京。"),
    Question("法国的首都叫什么？", ("巴黎",), "法国的首都是巴黎。"),
    Question("埃菲尔铁塔在哪个国家？", ("法国",), "埃菲尔铁塔在法国的巴黎。"),
    Question("世界上面积最大的国家是哪个？", ("俄罗斯",), "面积最大的国家是俄罗斯。"),
    Question("中国最长的河流叫什么？", ("长江", "扬子江"), "中国最长的河流是长江。"),
    Question("兵马俑在中国的哪座城市？", ("西安",), "兵马俑在陕西省西安市。"),
    Question("Which city is the capital of Italy?", ("rome",), "The capital of Italy is Rome."),
    Question("In which country are the pyramids of Giza?", ("egypt",), "They are in Egypt."),
    Question("On which continent is Kenya?", ("africa",), "Kenya lies in the east of Africa."),
    Question("What is the capital of Germany?", ("berlin",), "The capital of Germany is Berlin."),
    Question("Which river flows through London?", ("thames",), "The Thames flows through London."),
    # nature
    Question("水的化学式是什么？", ("H2O", "H₂O"), "水的化学式是 H2O。"),
    Question("离太阳最近的行星是哪一颗？", ("水星",), "离太阳最近的行星是水星。"),
    Question("一只蜘蛛有几条腿？", ("8", "八"), "一只蜘蛛有八条腿。"),
    Question("彩虹通常说有几种颜色？", ("7", "七"), "彩虹通常说有七种颜色。"),
    Question("植物进行光合作用主要吸收哪种气体？", ("二氧化碳", "CO2"), "主要吸收二氧化碳。"),
    Question("人的血液为什么是红色的，因为哪种蛋白质？", ("血红蛋白",), "因为含有血红蛋白。"),
    Question(
        "Which planet is known as the red planet?", ("mars",), "Mars is known as the red planet."
    ),
    Question("What do bees make?", ("honey",), "Bees make honey and wax."),
    Question(
        "At how many degrees Celsius does water freeze?",
        ("0", "zero"),
        "Water freezes at 0 degrees Celsius.",
    ),
    Question(
        "What is the largest animal on Earth?", ("whale",), "The blue whale is the largest animal."
    ),
    Question("Which gas do people need to breathe?", ("oxygen",), "People need oxygen to breathe."),
    # history and letters
    Question("《西游记》里会七十二变的猴子叫什么？", ("孙悟空", "齐天大圣"), "他叫孙悟空。"),
    Question("《静夜思》的作者是谁？", ("李白",), "《静夜思》的作者是李白。"),
    Question("中华人民共和国成立于哪一年？", ("1949", "一九四九"), "成立于 1949 年。"),
    Question("“床前明月光”的下一句是什么？", ("疑是地上霜",), "下一句是“疑是地上霜”。"),
    Question("端午节人们常吃什么？", ("粽子",), "端午节人们常吃粽子。"),
    Question("提出相对论的科学家是谁？", ("爱因斯坦", "Einstein"), "相对论是爱因斯坦提出的。"),
    Question("Who wrote Romeo and Juliet?", ("shakespeare",), "William Shakespeare wrote it."),
    Question("Who painted the Mona Lisa?", ("leonardo", "da vinci"), "Leonardo da Vinci did."),
    Question("In which year did the Second World War end?", ("1945",), "It ended in 1945."),
    Question(
        "Who was the first person to walk on the moon?",
        ("armstrong",),
        "Neil Armstrong was the first, in 1969.",
    ),
    # numbers and reasoning
    Question("7 加 6 等于多少？", ("13", "十三"), "7 加 6 等于 13。"),
    Question("9 乘以 8 是多少？", ("72", "七十二"), "9 乘以 8 等于 72。"),
    Question("100 减去 37 等于几？", ("63", "六十三"), "100 减去 37 等于 63。"),
    Question("一个星期有几天？", ("7", "七"), "一个星期有七天。"),
    Question("一小时有多少分钟？", ("60", "六十"), "一小时有 60 分钟。"),
    Question("三角形有几条边？", ("3", "三"), "三角形有三条边。"),
    Question("我有 5 个橘子，又买了 4 个，现在有几个？", ("9", "九"), "现在有 9 个橘子。"),
    Question("What is 12 plus 15?", ("27", "twenty-seven"), "12 plus 15 is 27."),
    Question("What is half of 50?", ("25", "twenty-five"), "Half of 50 is 25."),
    Question("How many sides does a square have?", ("4", "four"), "A square has four sides."),
    Question("How many months are in a year?", ("12", "twelve"), "There are twelve months."),
    Question("Tom has 10 apples and eats 3. How many are left?", ("7", "seven"), "Seven are left."),
    Question(
        "Which is larger, 9 or 14? Answer with the number.", ("14", "fourteen"), "14 is larger."
    ),
    # language
    Question("“大”的反义词是什么？", ("小",), "“大”的反义词是“小”。"),
    Question("“苹果”用英语怎么说？", ("apple",), "“苹果”的英语是 apple。"),
    Question("把 cat 翻译成中文", ("猫",), "cat 的中文是“猫”。"),
    Question("“早晨”的反义词是什么？", ("晚上", "傍晚", "夜晚", "黄昏", "夜"), "是“晚上”。"),
    Question("把“我爱你”翻译成英语", ("i love you",), "I love you."),
    Question("What is the opposite of up?", ("down",), "The opposite of up is down."),
    Question("What is the past tense of go?", ("went",), "The past tense of go is went."),
    Question("How do you say hello in French?", ("bonjour", "salut"), "You say bonjour."),
    Question("What is the plural of mouse?", ("mice",), "The plural of mouse is mice."),
    Question("What does 水 mean in English?", ("water",), "It means water."),
    # machines
    Question("在 Python 里用哪个函数打印文字？", ("print",), "用 print 函数。"),
    Question("二进制只用哪两个数字？", ("0 和 1", "0和1", "0、1", "0与1"), "只用 0 和 1。"),
    Question("Which keyword defines a function in Python?", ("def",), "The keyword is def."),
    Question("What does CPU stand for?", ("central processing unit",), "Central processing unit."),
)
