//! Certificates for tests: a CA, and what it signs.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    IsCa, KeyIdMethod, KeyPair, RevokedCertParams, SanType, SerialNumber, date_time_ymd,
    string::Ia5String,
};

/// A CA in a directory of its own.
pub struct Certificates {
    directory: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Certificates {
    /// Makes a CA; its certificate is `ca.pem` in `directory`.
    #[must_use]
    pub fn create(directory: &Path) -> Self {
        std::fs::create_dir_all(directory).expect("a writable directory");
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("no names");
        params.distinguished_name.push(DnType::CommonName, "Marcot test CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("a certificate");
        std::fs::write(directory.join("ca.pem"), issuer.pem()).expect("writable");
        Self { directory: directory.to_owned(), issuer }
    }

    /// The CA's certificate.
    #[must_use]
    pub fn ca(&self) -> String {
        self.path("ca.pem")
    }

    /// Signs a certificate for `names`, and for URIs among them; returns the paths of chain and key.
    #[must_use]
    pub fn sign(&self, label: &str, names: &[&str]) -> (String, String) {
        self.sign_until(label, names, 2049)
    }

    /// A certificate that ended long ago.
    #[must_use]
    pub fn sign_expired(&self, label: &str, names: &[&str]) -> (String, String) {
        self.sign_until(label, names, 2002)
    }

    /// A certificate that ends on the first day of that year.
    #[must_use]
    pub fn sign_until(&self, label: &str, names: &[&str], year: i32) -> (String, String) {
        self.sign_as(label, names, year, None)
    }

    /// A certificate of that serial number, by which it can be revoked.
    #[must_use]
    pub fn sign_numbered(&self, label: &str, names: &[&str], serial: u64) -> (String, String) {
        self.sign_as(label, names, 2049, Some(SerialNumber::from(serial)))
    }

    fn sign_as(
        &self,
        label: &str,
        names: &[&str],
        year: i32,
        serial: Option<SerialNumber>,
    ) -> (String, String) {
        let (uris, names): (Vec<String>, Vec<String>) =
            names.iter().map(ToString::to_string).partition(|name| name.contains("://"));
        let mut params = CertificateParams::new(names).expect("names");
        for uri in uris {
            let uri = Ia5String::try_from(uri).expect("ASCII");
            params.subject_alt_names.push(SanType::URI(uri));
        }
        params.serial_number = serial;
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let (chain, secret) = (format!("{label}.pem"), format!("{label}.key"));
        std::fs::write(self.directory.join(&chain), certificate.pem()).expect("writable");
        std::fs::write(self.directory.join(&secret), key.serialize_pem()).expect("writable");
        (self.path(&chain), self.path(&secret))
    }

    /// The CA's list of revoked certificates, of which there are none, until the first day of that year.
    #[must_use]
    pub fn revocation_list(&self, year: i32) -> String {
        self.revocation_list_of(year, &[])
    }

    /// The CA's list with the certificates of those serial numbers.
    #[must_use]
    pub fn revocation_list_of(&self, year: i32, serials: &[u64]) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2001, 2, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2001, 2, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).expect("a list").pem().expect("in PEM form");
        let name = format!("{year}-{}.crl", serials.len());
        std::fs::write(self.directory.join(&name), list).expect("writable");
        self.path(&name)
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }
}
