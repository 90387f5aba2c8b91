"""The request core behind HTTP: Starlette, uvicorn, Prometheus and a page. No torch.

app.py       the application: errors, headers      body.py         a body, read within its limits
routes.py    what is answered where                callers.py      which requests are answered at all
metrics.py   numbers for Prometheus                connection.py   how long one may take to ask
run.py       one process, from start to drain      listener.py     which connections are accepted
"""
