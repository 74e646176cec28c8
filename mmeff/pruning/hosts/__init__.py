"""One module per model family; each lists its hosts in `HOSTS`."""
