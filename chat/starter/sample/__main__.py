"""`python -m chat.starter.sample` writes the sample dataset anew."""

from chat.starter.sample import TRAIN, write

write(TRAIN.parent)
