//! What to do about a certificate that one side does not believe.

use rustls::CertificateError;

/// About the server's certificate, by what is wrong with it.
pub(super) fn on(why: &CertificateError) -> &'static str {
    use CertificateError as E;
    match why {
        E::Expired | E::ExpiredContext { .. } => {
            "it has expired: renew it on the donor, which reads its files again by itself"
        }
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "it is not valid yet: compare the clocks of both hosts"
        }
        E::NotValidForName | E::NotValidForNameContext { .. } => {
            "connect to the donor by a name that its certificate has, or issue one for this name"
        }
        E::Revoked => "its CA has revoked it (--ssl-crl): the donor needs another one",
        E::UnknownRevocationStatus => {
            "no list in --ssl-crl is of its CA: add the lists of all CAs of its chain"
        }
        E::ExpiredRevocationList | E::ExpiredRevocationListContext { .. } => {
            "the list in --ssl-crl has run out: get its CA's next one"
        }
        _ => {
            "give its CA (--ssl-ca FILE) or the certificate's SHA-256 fingerprint, which the donor \
             prints at start (--donor-fingerprint)"
        }
    }
}

/// About the client's own certificate, by the alert that the server has sent.
pub(super) fn on_alert(alert: &str) -> &'static str {
    match alert {
        "CertificateRequired" => {
            "it wants a client certificate; give one with --ssl-cert and --ssl-key"
        }
        "CertificateExpired" => {
            "the client certificate (--ssl-cert) has expired, or is not valid yet: renew it, or \
             compare the clocks of both hosts"
        }
        "CertificateRevoked" => "the client certificate (--ssl-cert) was revoked: get another one",
        "UnknownCA" => {
            "the client certificate (--ssl-cert) is of another CA than those of its \
             --tls-client-ca, or its --tls-client-crl has run out; its log says which"
        }
        _ => "it may want another client certificate (--ssl-cert and --ssl-key); its log says why",
    }
}
