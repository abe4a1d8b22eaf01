from fastalign.rollout.engine import EngineError, Rollout, RolloutEngine, SamplingSettings, SyncReport


def make_engine(config, **kw):
    from fastalign.rollout.hf import HfEngine
    return HfEngine(kw["model_path"], config, dtype=kw["dtype"], max_model_len=kw["max_model_len"], device=kw["device"])
