import time, sys
sys.path.insert(0,"tests/models")
def test_a(tiny_checkpoint, random_batch):
    import test_scan as t
    from ot_merge_jax.io.hf import load_hf
    import functools, jax
    from ot_merge_jax import spaces
    cfg, params = load_hf(tiny_checkpoint("qwen2",layers=2))
    batch = random_batch(cfg, padding="left")
    for opts in (t.NO_FUSION,None):
      for un in (1,2):
        T=time.process_time()
        step = functools.partial(t.forward, cfg=cfg, capture=frozenset(spaces.SITES), unroll=un)
        l=jax.jit(step).lower(params,batch); print(opts,un,"lower",time.process_time()-T);T=time.process_time()
        c=l.compile(compiler_options=opts); print("compile",time.process_time()-T);T=time.process_time()
        jax.block_until_ready(c(params,batch)); print("run",time.process_time()-T)
