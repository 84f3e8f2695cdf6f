"""How a rank lives and ends: signals, exit status and messages, the watchdog, and where its main thread is."""
