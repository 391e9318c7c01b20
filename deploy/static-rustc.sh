#!/bin/sh
# cargo's RUSTC_WORKSPACE_WRAPPER: links the three programs statically, and changes nothing else. In
# RUSTFLAGS the same flag would build every library anew, for code that is the same.
case " $* " in
  *" --crate-name marcot_donor "*" --crate-type bin "* | \
    *" --crate-name marcot_recipient "*" --crate-type bin "* | \
    *" --crate-name marcot "*" --crate-type bin "*)
    exec "$@" -C target-feature=+crt-static
    ;;
esac
exec "$@"
