"""A checkpoint's own description of its answers: ``response_template`` of tokenizer_config.json.

Source of the format: transformers 5, "Response Parsing" (https://huggingface.co/docs/transformers/chat_response_parsing).

pattern   delimiters that are regular expressions, found while a text is written
contents  what stands between delimiters, as a value
template  the description, checked
reader    one answer, read by it
"""
