"""An OpenAI-compatible HTTP server: scheduler, API and chat page. It needs the [serve] extra."""
