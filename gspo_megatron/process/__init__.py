"""A rank lives and ends here: signals, exit status and messages, the watchdog, and where its main thread is."""
