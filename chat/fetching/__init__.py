"""Checkpoints that are fetched: the rules, the run, its pages and REST. The transfer itself is in
chat/checkpoints/fetch/, which knows none of this.
"""
