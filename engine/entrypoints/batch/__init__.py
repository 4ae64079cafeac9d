"""Files of requests to files of answers: jobs that may be cut off at any moment and lose nothing.

    source     the rows of the input, numbered                                 JSON lines or Parquet
    rows       a row of our own format: what it asks for, what it comes to     {"prompt": ...}
    openai     the same for OpenAI's batch format                              {"custom_id": ..., "body": ...}
    worker     runs rows on one engine
    journal    keeps finished rows as they come, and knows which they are
    output     puts them in order at the end, as JSON lines or Parquet
    job        leads a job through these on the engine of this process
    on_ray     leads it through many engines

A job has three files beside its input. ``OUTPUT.partial``, the journal, exists until the job is complete.
``OUTPUT`` appears complete or not at all. ``OUTPUT.job.json`` says which job made it.
"""
