"""The OpenAI fine-tuning protocol as a server: `tunesmith serve`.

protocol     requests and objects as they go over the wire
app          routes, keys, limits, the error envelope, the OpenAPI document
files jobs models completions   what each endpoint does
supervisor   starts, watches and restarts the workers of jobs;  prepare  checks a job's files in a process of its own
inference    models in memory, one running batch for each base
store        the database (SQLite in WAL mode) and where the bytes of files lie
"""
