//! Compiles the .proto files with protox, so that no protoc is needed on the machine.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 4] = [
    "marcot/common/v1/common.proto",
    "marcot/auth/v1/auth.proto",
    "marcot/donor/v1/donor.proto",
    "marcot/recipient/v1/recipient.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=marcot");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("marcot.binpb"), descriptors.encode_to_vec())?;
    // Payloads, paths and digests are `Bytes`: decoding a message must not copy them.
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
