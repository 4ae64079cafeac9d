"""What bodies of requests ask for, and what answers to them look like: data in, data out, no files and no sockets.

    asked    what a body asks for, whatever protocol it is written in, and the fields that protocols share
    openai   bodies and answers of OpenAI's API; the other folders are those of others

A protocol is read and written here; who serves it (batch files) adds what is around.
"""
