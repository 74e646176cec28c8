"""One module per family of timm models; each lists its hosts in `HOSTS`."""
