//! Where spans go: nowhere, or by OTLP over gRPC to the collector that the OTEL_* variables name.
//!
//! Invariants:
//! * Without a collector nothing connects, no thread runs, and spans of level DEBUG, those of stages
//!   and batches, are not made.
//! * A collector that is slow, silent or gone costs a clone nothing: spans wait in a bounded queue,
//!   which drops what does not fit, and each export has an end.
//! * A variable that is wrong is told by its name and left out: telemetry keeps no server from its
//!   start. Values are not told where they may be secret.

use std::{
    fmt, fs, io,
    ops::RangeInclusive,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::{HeaderName, uri::Scheme};
use opentelemetry::KeyValue;
use opentelemetry_otlp::{
    ExporterBuildError, SpanExporter as OtlpExporter, WithExportConfig as _, WithTonicConfig as _,
};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{
        BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracerProvider, SpanData, SpanExporter,
    },
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tracing::{Level, info, warn};

/// Longest time that the end of the process waits for a collector to take what is left.
pub(super) const FLUSH_MAX: Duration = Duration::from_secs(3);

/// Where a collector is when an exporter is asked for without an address: OpenTelemetry's default.
const ENDPOINT_DEFAULT: &str = "http://localhost:4317";

/// OpenTelemetry's defaults. A span is about 1 KiB, so the queue is 2 MiB, and 64 MiB at most.
const QUEUE_DEFAULT: u64 = 2048;
const QUEUE_MAX: u64 = 65_536;
const BATCH_DEFAULT: u64 = 512;
const DELAY_MS_DEFAULT: u64 = 5_000;
const TIMEOUT_MS_DEFAULT: u64 = 10_000;

/// Longest delay and timeout: what is told later than that is of no use to who looks at a clone.
const MS_MAX: u64 = 600_000;

/// Largest file of certificates: a bundle of all public roots has a fifth of it.
const PEM_BYTES_MAX: u64 = 1 << 20;

/// The spans of a process that tells nobody.
pub(super) const LEVEL_OFF: Level = Level::INFO;

/// Those of one that does.
const LEVEL_ON: Level = Level::DEBUG;

/// Where spans go, and what was wrong with the variables that say so.
#[derive(Debug)]
pub(super) struct Traces {
    /// Makes spans.
    pub(super) provider: SdkTracerProvider,
    /// The most detailed spans that are made.
    pub(super) level: Level,
    /// The collector.
    pub(super) endpoint: Option<String>,
    /// To be logged once there is a log.
    pub(super) warnings: Vec<String>,
}

impl Traces {
    /// As the environment says; `service` is named unless that names another.
    pub(super) fn from_env(service: &str) -> Self {
        let mut variables = Variables::new(|name| std::env::var(name).ok());
        let provider = variables.exporter().and_then(|exporter| {
            let endpoint = exporter.endpoint.uri().to_string();
            let built = exporter.provider(resource(&variables, service));
            match built {
                Ok(provider) => Some((provider, endpoint)),
                Err(e) => {
                    variables.warnings.push(format!("no spans are exported: {e}"));
                    None
                }
            }
        });
        let warnings = variables.warnings;
        match provider {
            Some((provider, endpoint)) => {
                Self { provider, level: LEVEL_ON, endpoint: Some(endpoint), warnings }
            }
            None => {
                let provider = SdkTracerProvider::builder().build();
                Self { provider, level: LEVEL_OFF, endpoint: None, warnings }
            }
        }
    }
}

/// What names the process to those who look at its spans.
fn resource(variables: &Variables, service: &str) -> Resource {
    let attributes = variables.get("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let is_named = variables.get("OTEL_SERVICE_NAME").is_some()
        || attributes.split(',').any(|part| part.trim_start().starts_with("service.name="));
    // The variables' own attributes are the builder's.
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let builder = Resource::builder().with_attribute(version);
    if is_named {
        return builder.build();
    }
    builder.with_service_name(format!("marcot-{service}")).build()
}

/// A collector, and how spans get there.
#[derive(Debug)]
struct Exporter {
    endpoint: Endpoint,
    timeout: Duration,
    queue: usize,
    batch: usize,
    delay: Duration,
    sampler: Sampler,
}

impl Exporter {
    /// Connects to nobody yet. Within a runtime, which carries the connection.
    fn provider(self, resource: Resource) -> Result<SdkTracerProvider, ExporterBuildError> {
        let collector = self.endpoint.uri().to_string();
        let exporter = OtlpExporter::builder()
            .with_tonic()
            .with_channel(self.endpoint.connect_lazy())
            .with_timeout(self.timeout)
            .build()?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(self.queue)
            .with_max_export_batch_size(self.batch)
            .with_scheduled_delay(self.delay)
            .build();
        let told = ToldExporter { exporter, collector, fails: AtomicBool::new(false) };
        let processor = BatchSpanProcessor::builder(told).with_batch_config(batches).build();
        Ok(SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(self.sampler)
            .with_resource(resource)
            .build())
    }
}

/// The OTEL_* variables; what is wrong with them is collected.
struct Variables {
    read: Box<dyn Fn(&str) -> Option<String>>,
    warnings: Vec<String>,
}

impl fmt::Debug for Variables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Variables").field("warnings", &self.warnings).finish_non_exhaustive()
    }
}

impl Variables {
    fn new(read: impl Fn(&str) -> Option<String> + 'static) -> Self {
        Self { read: Box::new(read), warnings: Vec::new() }
    }

    /// One that is empty is not set, as OpenTelemetry has it.
    fn get(&self, name: &str) -> Option<String> {
        (self.read)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    /// That of traces alone goes before that of all signals; with the name of the one that counts.
    fn of_otlp(&self, suffix: &str) -> Option<(String, String)> {
        let names = ["OTEL_EXPORTER_OTLP_TRACES", "OTEL_EXPORTER_OTLP"];
        names.into_iter().find_map(|prefix| {
            let name = format!("{prefix}_{suffix}");
            self.get(&name).map(|value| (name, value))
        })
    }

    fn warn(&mut self, name: &str, value: &str, why: impl fmt::Display) {
        self.warnings.push(format!("{name} is `{value}`: {why}"));
    }

    /// `None`: spans are not exported.
    fn exporter(&mut self) -> Option<Exporter> {
        if self.get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return None;
        }
        let endpoint = self.of_otlp("ENDPOINT");
        let wanted = match self.get("OTEL_TRACES_EXPORTER").as_deref() {
            Some("none") => false,
            Some("otlp") => true,
            None => endpoint.is_some(),
            Some(other) => {
                let why = "no spans are exported; `otlp` and `none` are known";
                self.warn("OTEL_TRACES_EXPORTER", other, why);
                false
            }
        };
        if !wanted {
            return None;
        }
        if let Some((name, value)) = self.of_otlp("PROTOCOL").filter(|(_, value)| value != "grpc") {
            let why = "no spans are exported; Marcot speaks `grpc`, which collectors take on port \
                       4317";
            self.warn(&name, &value, why);
            return None;
        }
        let endpoint = self.endpoint(endpoint)?;
        self.check_lists();
        let timeout = self.otlp_timeout();
        let queue = self.number("OTEL_BSP_MAX_QUEUE_SIZE", QUEUE_DEFAULT, 1..=QUEUE_MAX);
        let batch = BATCH_DEFAULT.min(queue);
        let batch = self.number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", batch, 1..=queue);
        let delay = self.number("OTEL_BSP_SCHEDULE_DELAY", DELAY_MS_DEFAULT, 1..=MS_MAX);
        Some(Exporter {
            endpoint: endpoint.connect_timeout(timeout).timeout(timeout),
            timeout,
            queue: usize::try_from(queue).unwrap_or(usize::MAX),
            batch: usize::try_from(batch).unwrap_or(usize::MAX),
            delay: Duration::from_millis(delay),
            sampler: self.sampler(),
        })
    }

    fn endpoint(&mut self, given: Option<(String, String)>) -> Option<Endpoint> {
        let (name, value) = given
            .unwrap_or_else(|| ("OTEL_TRACES_EXPORTER".to_owned(), ENDPOINT_DEFAULT.to_owned()));
        let insecure = self.of_otlp("INSECURE");
        let address = match value.contains("://") {
            true => value.clone(),
            false if insecure.is_some_and(|(_, value)| value.eq_ignore_ascii_case("true")) => {
                format!("http://{value}")
            }
            false => format!("https://{value}"),
        };
        let endpoint = match Endpoint::from_shared(address) {
            Ok(endpoint) if endpoint.uri().host().is_some() => endpoint,
            _ => {
                let why =
                    "no spans are exported; write it as http://HOST:4317 or https://HOST:4317";
                self.warn(&name, &value, why);
                return None;
            }
        };
        match endpoint.uri().scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => Some(endpoint),
            Some(scheme) if *scheme == Scheme::HTTPS => self.tls(endpoint),
            _ => {
                self.warn(&name, &value, "no spans are exported; http:// and https:// are known");
                None
            }
        }
    }

    /// A collector's certificate is one of the system's roots, or of a file.
    fn tls(&mut self, endpoint: Endpoint) -> Option<Endpoint> {
        let mut tls = ClientTlsConfig::new();
        tls = match self.of_otlp("CERTIFICATE") {
            Some((name, path)) => {
                tls.ca_certificate(Certificate::from_pem(self.pem(&name, &path)?))
            }
            None => tls.with_native_roots(),
        };
        let certificate = self.of_otlp("CLIENT_CERTIFICATE");
        match (certificate, self.of_otlp("CLIENT_KEY")) {
            (Some((name, path)), Some((key_name, key_path))) => {
                let certificate = self.pem(&name, &path)?;
                let key = self.pem(&key_name, &key_path)?;
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            (None, None) => {}
            (Some((name, value)), None) | (None, Some((name, value))) => {
                let why = "no spans are exported; OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and \
                           OTEL_EXPORTER_OTLP_CLIENT_KEY go together";
                self.warn(&name, &value, why);
                return None;
            }
        }
        match endpoint.tls_config(tls) {
            Ok(endpoint) => Some(endpoint),
            Err(e) => {
                let why = crate::failure::chain(&e);
                self.warnings.push(format!("no spans are exported; TLS to the collector: {why}"));
                None
            }
        }
    }

    fn pem(&mut self, name: &str, path: &str) -> Option<Vec<u8>> {
        let read = fs::File::open(path).and_then(|file| {
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut io::Read::take(file, PEM_BYTES_MAX), &mut bytes)?;
            Ok(bytes)
        });
        read.map_err(|e| self.warn(name, path, format!("no spans are exported; {e}"))).ok()
    }

    /// In milliseconds.
    fn otlp_timeout(&mut self) -> Duration {
        let (name, _) = self.of_otlp("TIMEOUT").unwrap_or_default();
        let timeout = self.number(&name, TIMEOUT_MS_DEFAULT, 1..=MS_MAX);
        Duration::from_millis(timeout)
    }

    fn number(&mut self, name: &str, default: u64, allowed: RangeInclusive<u64>) -> u64 {
        let Some(text) = self.get(name) else { return default };
        match text.parse() {
            Ok(number) if allowed.contains(&number) => number,
            _ => {
                let (least, most) = (allowed.start(), allowed.end());
                let why = format!("{default} is used; a number from {least} to {most} is allowed");
                self.warn(name, &text, why);
                default
            }
        }
    }

    fn sampler(&mut self) -> Sampler {
        let root = |sampler| Sampler::ParentBased(Box::new(sampler));
        let Some(name) = self.get("OTEL_TRACES_SAMPLER") else { return root(Sampler::AlwaysOn) };
        match name.as_str() {
            "always_on" => Sampler::AlwaysOn,
            "always_off" => Sampler::AlwaysOff,
            "traceidratio" => self.ratio(),
            "parentbased_always_on" => root(Sampler::AlwaysOn),
            "parentbased_always_off" => root(Sampler::AlwaysOff),
            "parentbased_traceidratio" => root(self.ratio()),
            other => {
                let why = "parentbased_always_on is used; always_on, always_off, traceidratio, and \
                           each with parentbased_ before it are known";
                self.warn("OTEL_TRACES_SAMPLER", other, why);
                root(Sampler::AlwaysOn)
            }
        }
    }

    fn ratio(&mut self) -> Sampler {
        const NAME: &str = "OTEL_TRACES_SAMPLER_ARG";
        let Some(text) = self.get(NAME) else { return Sampler::TraceIdRatioBased(1.0) };
        match text.parse() {
            Ok(ratio) if (0.0..=1.0).contains(&ratio) => Sampler::TraceIdRatioBased(ratio),
            _ => {
                self.warn(NAME, &text, "1.0 is used; a number from 0.0 to 1.0 is allowed");
                Sampler::TraceIdRatioBased(1.0)
            }
        }
    }

    /// Lists that the exporter reads by itself, leaving out what it does not understand.
    fn check_lists(&mut self) {
        if let Some((name, value)) = self.of_otlp("HEADERS") {
            for (i, entry) in entries(&value) {
                let key = entry.split_once('=').map(|(key, _)| key.trim());
                if key.is_none_or(|key| key.parse::<HeaderName>().is_err()) {
                    // Without its value: it may be a token.
                    let text = format!("{name}: entry {i} is no NAME=VALUE, and is left out");
                    self.warnings.push(text);
                }
            }
        }
        const ATTRIBUTES: &str = "OTEL_RESOURCE_ATTRIBUTES";
        let attributes = self.get(ATTRIBUTES).unwrap_or_default();
        for (i, entry) in entries(&attributes) {
            if entry.split_once('=').is_none_or(|(key, _)| key.trim().is_empty()) {
                let text = format!("{ATTRIBUTES}: entry {i} is no KEY=VALUE, and is left out");
                self.warnings.push(text);
            }
        }
        if let Some((name, value)) = self.of_otlp("COMPRESSION").filter(|(_, v)| v != "none") {
            self.warn(&name, &value, "spans are sent as they are; `none` is known");
        }
    }
}

/// Entries of a list, from 1; empty ones are none.
fn entries(list: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(list.split(',')).filter(|(_, entry)| !entry.trim().is_empty())
}

/// Says once that a collector does not take spans, and once that it does again: a line for each
/// batch would fill the log of who has no collector today.
#[derive(Debug)]
struct ToldExporter<E> {
    exporter: E,
    collector: String,
    fails: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for ToldExporter<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let (collector, spans) = (&self.collector, batch.len());
        match self.exporter.export(batch).await {
            Ok(()) if self.fails.swap(false, Ordering::Relaxed) => {
                info!(%collector, "spans are exported again");
            }
            Err(error) if !self.fails.swap(true, Ordering::Relaxed) => {
                warn!(%collector, spans, %error, "spans are not exported, they are dropped");
            }
            Ok(()) | Err(_) => {}
        }
        Ok(())
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// What comes of variables.
    fn parsed(given: &[(&'static str, &str)]) -> (Option<Exporter>, Vec<String>) {
        let given: BTreeMap<_, _> =
            given.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let mut variables = Variables::new(move |name| given.get(name).cloned());
        let exporter = variables.exporter();
        (exporter, variables.warnings)
    }

    const COLLECTOR: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317");

    #[test]
    fn spans_are_exported_only_where_a_collector_is_named_and_nothing_forbids_it() {
        for off in [
            &[][..],
            &[COLLECTOR, ("OTEL_SDK_DISABLED", "TRUE")],
            &[COLLECTOR, ("OTEL_TRACES_EXPORTER", "none")],
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", " ")],
            &[("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://collector:4317")],
        ] {
            let (exporter, warnings) = parsed(off);
            assert!(exporter.is_none() && warnings.is_empty(), "{off:?}: {warnings:?}");
        }
        for (on, uri) in [
            (&[COLLECTOR][..], "http://collector:4317/"),
            (&[("OTEL_TRACES_EXPORTER", "otlp")][..], "http://localhost:4317/"),
            (
                &[COLLECTOR, ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://traces:1")][..],
                "https://traces:1/",
            ),
            (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "traces:1")][..], "https://traces:1/"),
            (
                &[
                    ("OTEL_EXPORTER_OTLP_ENDPOINT", "traces:1"),
                    ("OTEL_EXPORTER_OTLP_INSECURE", "true"),
                ][..],
                "http://traces:1/",
            ),
        ] {
            let (exporter, warnings) = parsed(on);
            assert_eq!(warnings, [""; 0], "{on:?}");
            let exporter = exporter.unwrap();
            assert_eq!(exporter.endpoint.uri().to_string(), uri, "{on:?}");
            let (queue, batch, timeout) = (exporter.queue, exporter.batch, exporter.timeout);
            assert_eq!((queue, batch, timeout), (2048, 512, Duration::from_secs(10)), "{on:?}");
        }
    }

    #[test]
    fn a_variable_that_keeps_spans_back_is_named_with_its_value() {
        for (name, value) in [
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://collector"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://a b"),
        ] {
            let (exporter, warnings) = parsed(&[COLLECTOR, (name, value)]);
            assert!(exporter.is_none(), "{name}");
            let [warning] = &warnings[..] else { panic!("{name}: {warnings:?}") };
            assert!(warning.starts_with(&format!("{name} is `{value}`: ")), "{warning}");
            assert!(warning.contains("no spans are exported"), "{warning}");
        }
        let tls = ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector:4317");
        for name in ["OTEL_EXPORTER_OTLP_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_KEY"] {
            let (exporter, warnings) = parsed(&[tls, (name, "/not/there")]);
            assert!(exporter.is_none(), "{name}");
            assert!(warnings[0].contains(name) && warnings[0].contains("/not/there"));
        }
    }

    #[test]
    fn numbers_and_samplers_out_of_bounds_are_named_and_the_default_is_used() {
        for (name, value) in [
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "65537"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2049"),
            ("OTEL_BSP_SCHEDULE_DELAY", "soon"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "-1"),
            ("OTEL_TRACES_SAMPLER", "sometimes"),
        ] {
            let (exporter, warnings) = parsed(&[COLLECTOR, (name, value)]);
            let exporter = exporter.unwrap();
            assert_eq!((exporter.queue, exporter.batch), (2048, 512), "{name}");
            assert_eq!(exporter.delay, Duration::from_secs(5), "{name}");
            let [warning] = &warnings[..] else { panic!("{name}: {warnings:?}") };
            assert!(warning.starts_with(&format!("{name} is `{value}`: ")), "{warning}");
        }
        let ratio = ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio");
        for (value, expected, warned) in [("0.25", "0.25", 0), ("1.5", "1.0", 1)] {
            let given = [COLLECTOR, ratio, ("OTEL_TRACES_SAMPLER_ARG", value)];
            let (exporter, warnings) = parsed(&given);
            let sampler = format!("{:?}", exporter.unwrap().sampler);
            assert_eq!(sampler, format!("ParentBased(TraceIdRatioBased({expected}))"));
            assert_eq!(warnings.len(), warned, "{warnings:?}");
        }
        let small = [COLLECTOR, ("OTEL_BSP_MAX_QUEUE_SIZE", "8")];
        assert_eq!(parsed(&small).0.unwrap().batch, 8);
    }

    /// Guards tokens of collectors: a header's value is in no warning.
    #[test]
    fn a_wrong_header_is_told_by_its_place_only() {
        let headers = ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=s3cret,s3cret,a b=s3cret");
        let (exporter, warnings) = parsed(&[COLLECTOR, headers]);
        assert!(exporter.is_some());
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("entry 2") && warnings[1].contains("entry 3"));
        assert!(!warnings.concat().contains("s3cret"), "{warnings:?}");
    }
}
