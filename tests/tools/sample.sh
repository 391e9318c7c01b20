# shellcheck shell=bash
# A sample data directory, and whether a copy is the same. Source it after pair.sh. The check uses find,
# diff and cmp, so that nothing has to be installed for it.

FILES=300
LARGE_MIB=200

# What a clone holds beside the donor's tree.
CERTIFICATE=.marcot-certificate

# Names, types, modes, times, sizes, link counts and targets, one entry a line.
listing() {
  (cd "$1" && find . ! -path "./$CERTIFICATE" -printf '%y %m %T@ %n %P -> %l' \
    \( -type f -printf ' %s' -o -true \) -printf '\n' | sort)
}

make_sample() {
  local source=$1 number
  mkdir -p "$source/shop" "$source/plants"
  head -c "$((LARGE_MIB << 20))" /dev/urandom >"$source/ibdata1"
  for ((number = 0; number < FILES; number++)); do
    head -c $((number * 733)) "$source/ibdata1" >"$source/plants/table_$number.ibd"
  done
  seq 1 2000000 >"$source/shop/orders.csv"
  # 1 GiB of hole with a little data at both ends.
  echo 'a leaf at the start' >"$source/shop/sparse.ibd"
  truncate -s 1G "$source/shop/sparse.ibd"
  echo 'a leaf at the end' >>"$source/shop/sparse.ibd"
  : >"$source/shop/empty"
  ln "$source/shop/orders.csv" "$source/shop/orders hard link.csv"
  ln -s ../shop/orders.csv "$source/plants/orders"
}

check() {
  local source=$1 copy=$2
  listing "$source" >"$work/source.list"
  listing "$copy" >"$work/copy.list"
  diff "$work/source.list" "$work/copy.list" >&2 || die "names or attributes differ"
  diff --recursive --no-dereference --exclude="$CERTIFICATE" "$source" "$copy" >&2 || die "contents differ"
  local before after
  before=$(du -sk "$source" | cut -f1) after=$(du -sk "$copy" | cut -f1)
  ((after <= before + before / 20 + 1024)) || die "holes were filled: $before KiB, now $after KiB"
}
