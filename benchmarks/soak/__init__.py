"""An hour of `routellm up` in which files arrive, requests go on, and parts are killed."""
