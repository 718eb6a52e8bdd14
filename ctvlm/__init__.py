__version__ = "0.4.0"

_FROM = {"CTVLMModel": "model", "CTVLMConfig": "model", "CTVLMProcessor": "model", "load_any": "model", "load_volume": "preprocessing", "mine_report": "mining", "label_report": "findings", "explore": "viewer"}

def __getattr__(name): # the names that most begin with, loaded when they are used
    from importlib import import_module
    if name in _FROM: return getattr(import_module(f"ctvlm.{_FROM[name]}"), name)
    raise AttributeError(f"module 'ctvlm' has no attribute {name!r}")

def __dir__(): return [*globals(), *_FROM]
