//! Log-in to an account of the donor's database, which must be given the password itself.
//!
//! Invariants:
//! * A password goes to no donor unless the client's operator allows that donors are given passwords:
//!   which way to log in is the donor's choice, and one that was taken over would choose this one.
//! * On a plaintext connection a password goes only to a key made for this log-in, signed by a
//!   certificate that the client believes by CA and name or by fingerprint; else it does not go.
//! * The key is forgotten with its log-in: what was recorded can be opened by nobody later, and is
//!   of no use in another log-in.
//! * All sealed passwords have the same length.

use marcot_proto::auth::v1::{
    self as pb, database_password::Form, log_in_request::Step as Request,
};
use rustls::{
    SignatureScheme,
    crypto::{
        aws_lc_rs::{self, hpke::DH_KEM_X25519_HKDF_SHA256_AES_128 as HPKE},
        hpke::{EncapsulatedSecret, Hpke as _, HpkePrivateKey, HpkePublicKey},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    sign::CertifiedKey,
};
use tonic::Code;
use zeroize::Zeroizing;

use crate::{
    connect::Security,
    connection::Privilege,
    failure::Failure,
    tls::{client::ClientTls, sha256},
};

/// First bytes of what is signed and of HPKE's info: nothing else is signed or sealed so.
const DOMAIN: &[u8] = b"marcot database log-in v1";

/// Longest password, bytes: MySQL's clone plugin takes 32, its server 255 and more.
pub(super) const PASSWORD_BYTES_MAX: usize = 512;

/// All passwords are sealed as so many bytes, so that their length does not show.
const SEALED_BYTES: usize = PASSWORD_BYTES_MAX + 2;

/// Longest chain that is looked at.
const CHAIN_MAX: usize = 10;

/// Accounts of the database that a donor serves.
pub trait DatabaseAccounts: std::fmt::Debug + Send + Sync {
    /// Logs in to the database, and says what the account may do here. Blocks.
    fn log_in(&self, user: &str, password: &str) -> Result<Vec<Privilege>, Failure>;
}

/// Whose key a password may be sealed to.
#[derive(Debug, Clone, Copy)]
pub struct Trust<'a> {
    /// The donor's name, or its address.
    pub host: &'a str,
    /// CA or fingerprint.
    pub tls: &'a ClientTls,
}

/// What one log-in is about, for both sides.
struct Transcript([u8; 32]);

impl Transcript {
    fn new(user: &str, client_nonce: &[u8], server_nonce: &[u8], public_key: &[u8]) -> Self {
        let length = u32::try_from(user.len()).unwrap_or(u32::MAX).to_be_bytes();
        let parts = [&length, user.as_bytes(), client_nonce, server_nonce, public_key];
        Self(sha256(&parts.concat()))
    }

    /// What the certificate's key signs: in the form of TLS 1.3, whose own contexts are others.
    fn signed(&self) -> Vec<u8> {
        [&[0x20; 64][..], DOMAIN, &[0], &self.0].concat()
    }
}

/// The donor's half.
pub(super) struct Challenge {
    pub(super) message: pb::DatabaseChallenge,
    secret: Option<(HpkePrivateKey, Transcript)>,
}

impl Challenge {
    /// On an encrypted connection, or where there is no certificate, without a key.
    pub(super) fn new(
        user: &str,
        client_nonce: &[u8],
        certified: Option<&CertifiedKey>,
    ) -> Result<Self, Failure> {
        let nonce = random()?;
        let bare = pb::DatabaseChallenge { nonce: nonce.to_vec().into(), ..Default::default() };
        let Some(certified) = certified else {
            return Ok(Self { message: bare, secret: None });
        };
        if client_nonce.len() != nonce.len() {
            return Err(Failure::invalid("BAD_LOG_IN", "log-in: the client's nonce has 32 bytes"));
        }
        let failed = |what: &str| Failure::bug(format!("database log-in: {what}"));
        let (public, secret) = HPKE.generate_key_pair().map_err(|e| failed(&e.to_string()))?;
        let transcript = Transcript::new(user, client_nonce, &nonce, &public.0);
        let offered = aws_lc_rs::default_provider().signature_verification_algorithms;
        let signer = certified
            .key
            .choose_scheme(&offered.supported_schemes())
            .ok_or_else(|| failed("the certificate's key can sign nothing"))?;
        let signature =
            signer.sign(&transcript.signed()).map_err(|e| failed(&format!("sign: {e}")))?;
        let message = pb::DatabaseChallenge {
            public_key: public.0.into(),
            certificates: certified.cert.iter().map(|c| c.to_vec().into()).collect(),
            signature_scheme: u16::from(signer.scheme()).into(),
            signature: signature.into(),
            ..bare
        };
        Ok(Self { message, secret: Some((secret, transcript)) })
    }

    /// Reads the password that has come.
    pub(super) fn open(
        self,
        answer: pb::DatabasePassword,
        is_encrypted: bool,
    ) -> Result<Zeroizing<String>, Failure> {
        let damaged =
            || Failure::invalid("BAD_LOG_IN", "log-in: the sealed password cannot be opened");
        match (answer.form, self.secret) {
            (Some(Form::Password(password)), _) if is_encrypted => Ok(Zeroizing::new(password)),
            (Some(Form::Password(_)), _) => Err(crate::access::secret_in_clear("a password")),
            (Some(Form::Sealed(sealed)), Some((secret, transcript))) => {
                let enc = EncapsulatedSecret(sealed.encapsulated_key.to_vec());
                let opened = HPKE.open(&enc, DOMAIN, &transcript.0, &sealed.ciphertext, &secret);
                let opened = Zeroizing::new(opened.map_err(|_| damaged())?);
                unpad(&opened).ok_or_else(damaged)
            }
            _ => Err(damaged()),
        }
    }
}

/// The client's answer, or why it gives none.
pub(super) fn answer(
    challenge: &pb::DatabaseChallenge,
    user: &str,
    password: &str,
    client_nonce: &[u8],
    security: &Security,
    trust: Trust<'_>,
) -> Result<Request, Failure> {
    if password.len() > PASSWORD_BYTES_MAX {
        let text = format!("the password has {} bytes, 512 are allowed", password.len());
        return Err(Failure::invalid("BAD_PASSWORD", text));
    }
    let form = if security.encrypted {
        Form::Password(password.to_owned())
    } else {
        if trust.tls.ca.is_none() && trust.tls.fingerprint.is_none() {
            return Err(not_known());
        }
        if challenge.public_key.is_empty() {
            return Err(no_key());
        }
        let transcript =
            Transcript::new(user, client_nonce, &challenge.nonce, &challenge.public_key);
        verify(challenge, &transcript, trust)?;
        let key = HpkePublicKey(challenge.public_key.to_vec());
        let (enc, ciphertext) = HPKE
            .seal(DOMAIN, &transcript.0, &pad(password), &key)
            .map_err(|_| Failure::peer_misbehaved("log-in: the donor's key is none"))?;
        Form::Sealed(pb::SealedPassword {
            encapsulated_key: enc.0.into(),
            ciphertext: ciphertext.into(),
        })
    };
    Ok(Request::DatabasePassword(pb::DatabasePassword { form: Some(form) }))
}

/// That the key is the donor's: its certificate is believed as in TLS, and has signed this log-in.
fn verify(
    challenge: &pb::DatabaseChallenge,
    transcript: &Transcript,
    trust: Trust<'_>,
) -> Result<(), Failure> {
    let chain: Vec<CertificateDer<'_>> =
        challenge.certificates.iter().take(CHAIN_MAX).map(|der| (&der[..]).into()).collect();
    let Some((end_entity, intermediates)) = chain.split_first() else { return Err(no_key()) };
    let name = ServerName::try_from(trust.host.to_owned()).map_err(|_| {
        let text = format!("`{}` is neither a host name nor an address", trust.host);
        Failure::invalid("BAD_DONOR", text)
    })?;
    let untrusted = |why: String| {
        let host = trust.host;
        let text = format!(
            "the password of a database account is not sent: the key that {host} shows for it is not \
             trusted: {why}"
        );
        Failure::new(Code::FailedPrecondition, "CERTIFICATE_NOT_TRUSTED", text).mysql(2026)
    };
    let verifier = trust.tls.verifier().map_err(|e| untrusted(e.to_string()))?;
    verifier
        .verify_server_cert(end_entity, intermediates, &name, &[], UnixTime::now())
        .map_err(|e| untrusted(e.to_string()))?;
    let scheme = u16::try_from(challenge.signature_scheme).map(SignatureScheme::from);
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
    let known = scheme.ok().and_then(|scheme| {
        algorithms.mapping.iter().find(|(known, _)| *known == scheme).map(|(_, all)| *all)
    });
    let certificate =
        webpki::EndEntityCert::try_from(end_entity).map_err(|e| untrusted(e.to_string()))?;
    let message = transcript.signed();
    let is_right = known.unwrap_or_default().iter().any(|algorithm| {
        certificate.verify_signature(*algorithm, &message, &challenge.signature).is_ok()
    });
    if is_right { Ok(()) } else { Err(untrusted("its signature is wrong".to_owned())) }
}

/// What the server asks for is not what the client's operator allows.
pub(super) fn not_allowed() -> Failure {
    Failure::precondition(
        "DATABASE_ACCOUNTS_NOT_ALLOWED",
        "the donor asks for the password itself, to log in to its database with it \
         (--database-accounts), and was given nothing: start the recipient with \
         --allow-database-accounts if donors may learn the passwords that clones use, else give the \
         donor accounts of its own (--accounts)",
    )
    .mysql(2061)
}

fn not_known() -> Failure {
    Failure::precondition(
        "PASSWORD_NOT_SENT",
        "the donor's accounts are those of its database, which must be given the password itself, \
         and this connection is not encrypted: clone with REQUIRE SSL, or tell the recipient the \
         donor's CA (--ssl-ca) or fingerprint, to whose key the password is sealed then",
    )
    .mysql(2061)
}

fn no_key() -> Failure {
    Failure::precondition(
        "PASSWORD_NOT_SENT",
        "the donor's accounts are those of its database, which must be given the password itself, \
         this connection is not encrypted, and the donor has no certificate whose key the password \
         could be sealed to: start it with --tls-cert and --tls-key",
    )
    .mysql(2061)
}

pub(super) fn random() -> Result<[u8; 32], Failure> {
    let mut bytes = [0; 32];
    ::aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Failure::bug("the system gives no random bytes"))?;
    Ok(bytes)
}

fn pad(password: &str) -> Zeroizing<Vec<u8>> {
    let mut padded = Zeroizing::new(vec![0; SEALED_BYTES]);
    let length = u16::try_from(password.len()).unwrap_or(u16::MAX);
    padded[..2].copy_from_slice(&length.to_be_bytes());
    padded[2..2 + password.len()].copy_from_slice(password.as_bytes());
    padded
}

fn unpad(padded: &[u8]) -> Option<Zeroizing<String>> {
    let (length, rest) = padded.split_first_chunk::<2>()?;
    let password = rest.get(..u16::from_be_bytes(*length).into())?;
    Some(Zeroizing::new(std::str::from_utf8(password).ok()?.to_owned()))
}
