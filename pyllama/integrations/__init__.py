"""pyllama's ops in other libraries' models. Each module imports its library, which pyllama itself does not need."""
