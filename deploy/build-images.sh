#!/usr/bin/env bash
# Builds the images marcot-donor:VERSION and marcot-recipient:VERSION of deploy/Containerfile.
#
#   deploy/build-images.sh
#
#   PROFILE=release       cargo's profile; dev is for tests
#   CONTAINER_TOOL=podman the command that builds, with options if need be; docker does as well
#
# Needs Rust, binutils, and the tool; no registry. Last line: the sizes of the images.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=${PROFILE:-release}
read -r -a tool <<<"${CONTAINER_TOOL:-podman}"
target=${CARGO_TARGET_DIR:-$PWD/target}
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+ ]] || {
  echo "build-images.sh: Cargo.toml has no version" >&2
  exit 1
}

# With the whole workspace's features, so that libraries that are built serve here as well.
RUSTC_WORKSPACE_WRAPPER=$PWD/deploy/static-rustc.sh cargo build --locked --profile "$profile" \
  --workspace --bin marcot-donor --bin marcot-recipient --bin marcot >&2
built=$target/${profile/#dev/debug}

context=$(mktemp -d "$target/image.XXXXXX")
trap 'rm -rf "$context"' EXIT
for program in marcot-donor marcot-recipient marcot; do
  strip -o "$context/$program" "$built/$program"
  # A program that wants a loader would not start in an empty image.
  if readelf --program-headers "$context/$program" | grep -q INTERP; then
    echo "build-images.sh: $program is not static" >&2
    exit 1
  fi
done
for image in donor recipient; do
  "${tool[@]}" build --target "$image" --tag "marcot-$image:$version" \
    --label "org.opencontainers.image.version=$version" \
    --label "org.opencontainers.image.licenses=Apache-2.0" \
    --file deploy/Containerfile "$context" >&2
done
for image in donor recipient; do
  bytes=$("${tool[@]}" image inspect --format '{{.Size}}' "marcot-$image:$version")
  printf 'marcot-%s:%s %d bytes\n' "$image" "$version" "$bytes"
done
