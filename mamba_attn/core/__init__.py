"""The records that everything else is computed from: what a scan or a softmax layer did, and where its tokens lie.

Plain data and the rules that are defined on it; nothing here knows a model or runs a kernel.
"""
