"""How a checkpoint arrives from elsewhere: from the package index, from a model hub, from a folder,
an archive or a GGUF file.

Pure: no Django, and torch only inside gguf.py. `fetch.fetch` is the one door; portal-side life (the
run, its page) is chat/fetching.
"""
