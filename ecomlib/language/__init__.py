"""Text in the shop: a pretrained encoder, sessions of events, and learners on top of them (part "Large models").

A side wing of the library: it uses families, learners and evaluation, and nothing of those uses it. transformers is
imported where an encoder is loaded, peft where adapters are made.
"""
