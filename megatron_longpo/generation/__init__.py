"""Long documents in, self-generated short-to-long preference pairs out: the data side of LongPO (arXiv 2502.13922, §3).

corpus.py     documents, measured and cut by chunking.py
rollout.py    the steps for one document, with prompts.py, instructions.py, filters.py, language.py
runner.py     many documents at a time, asking http_engine.py or transformers_engine.py, kept by store.py
output.py     the pairs file and its report
"""
