"""Long documents in, self-generated short-to-long preference pairs out: the data side of LongPO (arXiv 2502.13922, §3).

documents.py → chunking.py → prompts.py, instructions.py → rollout.py (asks an engine, filters.py) → store.py → output.py
"""
