"""P-tuning v2 in pure torch: a prefix of keys and values before the prompt is all that is trained.

Method: Liu et al., P-Tuning v2, 2022 (arXiv:2110.07602), in the parametrisation of ChatGLM-6B's
ptuning/.

recipe.py holds no torch, so that the web process can check hyper-parameters; the rest needs it.
"""
