"""The request core behind HTTP: FastAPI, uvicorn, Prometheus and a page. No torch.

body.py      a body, read within its limits        metrics.py   numbers for Prometheus
app.py       the application: errors, headers      page.py      the page at `/`
routes.py    what is answered where                run.py       one process, from start to drain
"""
