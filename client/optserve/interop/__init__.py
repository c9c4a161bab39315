"""Moving between a parameter set and a library's own optimizer: pure functions from and to `optserve.State`.

`optserve.interop.torch`, `.optax` and `.keras` import their library; nothing else here does. What each library calls a rule's
state is in `_names`. What a library has no place for, or counts otherwise, raises InvalidState.
"""
