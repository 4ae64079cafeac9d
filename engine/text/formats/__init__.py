"""How families of models write reasoning and tool calls, and what reads them while they are written.

message  what an answer comes to, and the events that it comes as
source   text and special tokens, waited for
values   JSON, and Python's literals, as JSON
cast     texts to the types that a tool's schema states
scan     one answer: reasoning, content, calls
base     what a family is, and the registry; every other file is a family
"""
