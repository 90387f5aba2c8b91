"""The request core: everything between a request's bytes and its answer, but for HTTP. No torch.

    core = RequestCore.open({"sst2": Path("bundle")}, CoreOptions())   # loads, proves; blocks
    await core.start()                                                 # in an event loop
    answer = await core.infer("sst2", body, json_length=None)          # Open Inference Protocol v2
    answer = await core.predict("sst2", ["a fine film"], task=None)    # raw texts, or pairs
    answer = await core.classify("digits", jpeg_bytes)                 # a picture's bytes
    await core.close()                                                 # answers what it has taken

`infer` returns an `InferAnswer`: `reply.body` to send back, `reply.json_length` for the header
`Inference-Header-Content-Length` (None: JSON only). `predict` and `classify` return an `Answer`
with a `Prediction` per input. Both carry `queue_ms`, `compute_ms` and `batch_rows`. Whatever
cannot be answered raises `Refusal` with `status` (an HTTP status), `kind`, `retry_after_s` and a
sentence. Opening raises `UserError` or `WorkFailed`, as everywhere.

Who brings a batcher of their own (Ray Serve's, say) uses `ServedModel` alone, which is synchronous
and has no queue: `decode_request` → `model.check` → `model.run([arrays, …])` → `encode_reply`;
or `model.to_arrays(raws, task)` → `model.run` → `task.decode`. `run` takes
the arrays of several requests, pads texts to the longest, and gives each its own rows back.

A `RunnerFactory` opens the graph on a device; `open_runner` is the default.

    refusal.py       why a request is not answered          options.py    what may be set, limits
    json_body.py     JSON from strangers, and how much      tensors.py    what an input accepts
    protocol.py      bodies ↔ arrays
    model.py         one bundle, open and proven            batcher.py    rows of many requests
    preparing.py     pictures and long texts → arrays, in processes that can be killed
    prepare_child.py what runs in these
    request_core.py  all of it together
"""
