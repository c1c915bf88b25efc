import json, pytest, numpy as np
def test_a(tiny_checkpoint, random_batch, strict, texts):
    import jax
    from transformers import AutoTokenizer
    from ot_merge_jax.io.hf import load_hf
    from ot_merge_jax.models.decoder import forward
    for fam in ("llama","qwen2"):
        for kind in ("bpe","bpe-large","metaspace"):
            f=tiny_checkpoint(fam, tokenizer=kind)
            cfg,p=load_hf(f)
            tok=AutoTokenizer.from_pretrained(f, trust_remote_code=False)
            ids=tok(texts[0])["input_ids"]
            print(kind, type(tok).__name__, len(tok), cfg.vocab_size, len(ids), ids[:3], tok.decode(ids)==texts[0], tok.decode(ids)[:80], "|", texts[0][:80])
            b=random_batch(cfg,padding="left")
            with strict():
                out=forward(p,b,cfg=cfg)[0]
    print(np.std(out), b.mask, b.row_position); print([x.name for x in f.iterdir()])
@pytest.mark.torch
def test_t(torch_checkpoint, random_batch, strict):
    import torch
    from ot_merge_jax.io.hf import load_hf
    from ot_merge_jax.models.decoder import forward
    for fam in ("llama","qwen2"):
        f,m=torch_checkpoint(fam,tied=True); print(json.loads((f/"config.json").read_text()))
        cfg,p=load_hf(f)
        b=random_batch(cfg)
        o=forward(p,b,cfg=cfg)[0]
        t=m(torch.tensor(np.asarray(b.tokens))).logits.numpy()
        print(np.abs(o-t).max(), np.abs(t).max())
