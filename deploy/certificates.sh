#!/bin/sh
# Makes a CA, and certificates of it for a donor, a recipient and a caller, and prints them as the three
# Secrets that the overlays mount. For a try, and for tests: in production cert-manager makes and renews
# them (kustomize/components/tls-cert-manager).
#
#   certificates.sh NAMESPACE DONOR_NAME... | kubectl apply -f -
#   certificates.sh marcot-quickstart source-mariadb-0.source-mariadb | kubectl apply -f -
#
# The CA's key is thrown away. Needs openssl.
set -eu

[ $# -ge 2 ] || {
  echo "usage: certificates.sh NAMESPACE DONOR_NAME..." >&2
  exit 2
}
namespace=$1
shift
DAYS=365

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 077
cd "$work"

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days $DAYS -subj "/CN=marcot CA" \
  -addext keyUsage=critical,keyCertSign -keyout ca.key -out ca.crt 2>log || { cat log >&2; exit 1; }

# secret NAME DNS...: a certificate for these names, as a Secret.
secret() {
  name=$1
  shift
  names=$(printf ',DNS:%s' "$@")
  printf '%s\n' basicConstraints=critical,CA:FALSE keyUsage=critical,digitalSignature \
    extendedKeyUsage=serverAuth,clientAuth "subjectAltName=${names#,}" >extensions
  {
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$name" \
      -keyout tls.key -out tls.csr
    openssl x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days $DAYS \
      -extfile extensions -out tls.crt
  } 2>log || { cat log >&2; exit 1; }
  cat <<EOS
---
apiVersion: v1
kind: Secret
metadata:
  name: $name
  namespace: $namespace
type: kubernetes.io/tls
data:
  ca.crt: $(base64 -w0 <ca.crt)
  tls.crt: $(base64 -w0 <tls.crt)
  tls.key: $(base64 -w0 <tls.key)
EOS
}

secret marcot-donor-tls "$@"
# The names that the overlays' identities.toml know.
secret marcot-recipient-tls recipient.marcot "$@"
secret marcot-client-tls client.marcot
