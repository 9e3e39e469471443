"""Making smaller models: offline, on files. Serving code never imports this."""
